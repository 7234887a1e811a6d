"""The model hub: an id becomes a local directory of one commit; a local path stays what it is."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import (
    AuthRequiredError,
    CheckpointError,
    CheckpointNotFoundError,
    DownloadCorruptError,
    FileNotOnHubError,
    HubError,
    HubTimeoutError,
    MistralError,
    OfflineError,
    RepoNotFoundError,
)
from . import files as safe_files
from .shards import INDEX, SINGLE, weight_map_of

ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only")

CONFIGS = ("config.json", "params.json")
SMALL_FILES = (
    *CONFIGS,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "mistral_manifest.json",
    INDEX,
)

_DOWNLOADS_AT_ONCE = 4


@dataclass(frozen=True)
class _Repository:
    """What is asked of the hub; the token is kept out of its text."""

    id: str
    revision: str | None
    cache_dir: str | None
    token: str | bool | None = field(repr=False)

    def __str__(self) -> str:
        return f"{self.id}@{self.revision or 'main'}"


def resolve(
    path_or_id: safe_files.PathLike,
    *,
    files: Iterable[str] | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local path of a path, or of a hub id whose `files` are downloaded, all at one commit.

    Of `files` those the repository has, at least one; by default configs, tokenizers and safetensors weights,
    never another format. Where the hub does not answer, a complete copy in the cache is used, with a warning
    unless offline is what was asked for.
    Raises CheckpointNotFoundError (for a path), HubError and its kinds.
    """
    path = safe_files.as_path(path_or_id)
    if path_or_id and os.path.exists(path):
        return path
    if not isinstance(path_or_id, str) or _looks_like_path(path_or_id, path):
        raise CheckpointNotFoundError(f"{path}: no such file or directory; check the path.")
    cache = os.path.expanduser(cache_dir) if cache_dir is not None else None
    repository = _Repository(path_or_id, revision, cache, token)
    wanted = tuple(files) if files is not None else None
    from huggingface_hub import constants

    try:
        if local_files_only or constants.HF_HUB_OFFLINE:
            return _cached(repository, wanted)
        return _download(repository, wanted)
    except Exception as error:
        failure = _translated(error, repository)
        if failure is error:
            raise
        snapshot = None
        if type(failure) in (HubError, HubTimeoutError, OfflineError):
            with contextlib.suppress(OfflineError):
                snapshot = _cached(repository, wanted)
        if snapshot is None:
            raise failure from error
        warnings.warn(f"{failure} Its copy in the cache, commit {snapshot.name}, is used.", stacklevel=2)
        return snapshot


def _looks_like_path(text: str, path: Path) -> bool:
    """Hub ids have at most one slash, no leading dot, and no directory on this disk before it."""
    several = text.count("/") > 1 or (os.sep != "/" and os.sep in text)
    if text.startswith((".", "/", "~")) or several:
        return True
    return len(path.parts) > 1 and os.path.exists(path.parent)


def _download(repository: _Repository, wanted: Sequence[str] | None) -> Path:
    """Resolve the commit once and fetch what is wanted of it."""
    from huggingface_hub import HfApi, constants

    info = HfApi(token=repository.token).model_info(
        repository.id,
        revision=repository.revision,
        files_metadata=True,
        timeout=constants.HF_HUB_ETAG_TIMEOUT,
    )
    commit = info.sha
    if not commit or not re.fullmatch("[0-9a-f]{40}", commit):
        raise HubError(f"{repository}: the hub named no commit; try again.")
    digests = {file.rfilename: file.lfs.sha256 if file.lfs else None for file in info.siblings or ()}
    names = [name for name in (SMALL_FILES if wanted is None else wanted) if name in digests]
    if not names:
        looked_for = ", ".join(CONFIGS if wanted is None else wanted)
        raise FileNotOnHubError(f"{repository}: the repository has none of {looked_for}; check the id.")
    snapshot = _fetch(repository, commit, names, digests)
    if wanted is None:
        weights = _weight_files(snapshot)
        absent = [name for name in weights if name not in digests]
        if absent:
            others = ", ".join(sorted(n for n in digests if n.endswith((".bin", ".pth", ".h5", ".safetensors"))))
            raise FileNotOnHubError(
                f"{repository}: the repository lacks {', '.join(absent)} (it has: {others or 'no weights'}); "
                "only Hugging Face safetensors is read so far."
            )
        _fetch(repository, commit, weights, digests)
    _remember(repository, snapshot)
    return snapshot


def _fetch(repository: _Repository, commit: str, names: Sequence[str], digests: Mapping[str, str | None]) -> Path:
    """Download files of one commit and compare the new ones with the SHA-256 that the hub announced."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    def fetch(name: str) -> Path:
        cache = repository.cache_dir
        fresh = not isinstance(try_to_load_from_cache(repository.id, name, cache, commit), str)
        path = Path(hf_hub_download(repository.id, name, revision=commit, cache_dir=cache, token=repository.token))
        if fresh and digests[name]:
            _check_digest(path, digests[name], repository)
        return path

    with ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as pool:
        paths = list(pool.map(fetch, names))
    return paths[0].parent


def _check_digest(path: Path, expected: str | None, repository: _Repository) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise DownloadCorruptError(
            f"{repository}: {path.name} arrived with SHA-256 {found}, the hub announced {expected}; "
            "it was removed, load again."
        )


def _remember(repository: _Repository, snapshot: Path) -> None:
    """Note which commit a branch or tag meant, as the hub's own cache does, for the next time offline."""
    name = repository.revision or "main"
    if name != snapshot.name and re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name) and ".." not in name:
        with contextlib.suppress(MistralError):  # a read-only cache is no reason to fail
            safe_files.write_file(snapshot.parent.parent / "refs" / name, snapshot.name.encode())


def _cached(repository: _Repository, wanted: Sequence[str] | None) -> Path:
    """The snapshot in the cache, or OfflineError with what it lacks."""
    from huggingface_hub import try_to_load_from_cache

    names = CONFIGS if wanted is None else tuple(wanted)
    for name in names:
        found = try_to_load_from_cache(
            repository.id, name, cache_dir=repository.cache_dir, revision=repository.revision
        )
        if isinstance(found, str):
            break
    else:
        raise OfflineError(
            f"{repository}: offline, and the cache has none of {', '.join(names)}; "
            "load it once online or check cache_dir."
        )
    snapshot = Path(found).parent
    weights = _weight_files(snapshot) if wanted is None else []
    missing = [name for name in weights if not (snapshot / name).exists()]
    if missing:
        raise OfflineError(
            f"{repository}: offline, and the cache lacks {', '.join(missing)} of commit {snapshot.name}; "
            "load it once online."
        )
    return snapshot


def _weight_files(snapshot: Path) -> list[str]:
    """The safetensors files of a snapshot that has its small files."""
    index = snapshot / INDEX
    return sorted(set(weight_map_of(index)[0].values())) if index.exists() else [SINGLE]


# Errors


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _translated(error: Exception, repository: _Repository) -> Exception:
    """The error of this project for one of huggingface_hub, its HTTP library or the system; else itself.

    No text of the server goes into the message: it could repeat the token.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, MistralError):
        return error
    for cause in _chain(error):
        if isinstance(cause, LocalEntryNotFoundError):
            continue  # it only wraps the cause that follows
        for kind, ours, text in _kinds():
            if isinstance(cause, kind):
                return ours(f"{repository}: {text}.")
        if isinstance(cause, HfHubHTTPError):
            return _of_status(cause.response, repository)
    return _of_system(error, repository)


def _kinds() -> list[tuple[type, type[HubError], str]]:
    """Their error, ours, and what to do; subclasses first."""
    from huggingface_hub import errors as hf

    http = sys.modules[hf.HfHubHTTPError.__mro__[1].__module__.partition(".")[0]]  # httpx or httpx2
    log_in = "log in with `hf auth login` or pass token="
    unknown = f"no such repository, nor such a path here; check the id, or, if it is private, {log_in}"
    gated = f"gated; accept its licence on its page, then {log_in}"
    unreachable = "the hub cannot be reached; check the network, proxy and HF_ENDPOINT"
    return [
        (hf.HFValidationError, RepoNotFoundError, "neither a path here nor a hub id; check it"),
        (hf.LocalTokenNotFoundError, AuthRequiredError, f"there is no token; {log_in}"),
        (hf.GatedRepoError, AuthRequiredError, gated),
        (hf.RepositoryNotFoundError, RepoNotFoundError, unknown),
        (hf.RevisionNotFoundError, RepoNotFoundError, "no such revision; check the branch, tag or commit"),
        (hf.DisabledRepoError, HubError, "the repository is disabled; see its page"),
        (hf.EntryNotFoundError, FileNotOnHubError, "a file is not in the repository; check the revision"),
        (http.TimeoutException, HubTimeoutError, "the hub did not answer in time; try again"),
        (http.RemoteProtocolError, DownloadCorruptError, "the connection broke off; load again to resume"),
        (http.RequestError, OfflineError, unreachable),
        (hf.OfflineModeIsEnabled, OfflineError, "offline mode is on; unset HF_HUB_OFFLINE"),
    ]


def _of_status(response: object, repository: _Repository) -> HubError:
    status, headers = response.status_code, response.headers  # type: ignore[attr-defined]
    if status in (401, 403):
        return AuthRequiredError(f"{repository}: refused with {status}; log in with `hf auth login` or pass token=.")
    wait = headers.get("Retry-After", "")
    later = f"after {wait} s" if wait.isdigit() else "later"
    return HubError(f"{repository}: the hub answered with status {status}; try again {later}.")


def _of_system(error: Exception, repository: _Repository) -> Exception:
    if "Consistency check failed" in str(error):
        return DownloadCorruptError(f"{repository}: a download has the wrong size; load again.")
    if isinstance(error, OSError) and not isinstance(error, CheckpointError):
        text = error.strerror or type(error).__name__
        return HubError(error.errno or 0, f"{repository}: {text}; check the cache directory and its free space.")
    if isinstance(error, (ValueError, LookupError)):
        return HubError(f"{repository}: the hub's answer cannot be read; check HF_ENDPOINT.")
    return error
