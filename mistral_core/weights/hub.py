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
from pathlib import Path
from typing import NamedTuple

from .. import strict_json
from ..errors import (
    AuthRequiredError,
    CheckpointError,
    CheckpointIndexError,
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

ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only")

CONFIGS = ("config.json", "params.json")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
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


class _Repository(NamedTuple):
    """What is asked of the hub; the token is kept out of its text."""

    id: str
    revision: str | None
    cache_dir: str | None
    token: str | bool | None

    def __str__(self) -> str:
        return f"{self.id}@{self.revision or 'main'}"

    __repr__ = __str__


def resolve(
    path_or_id: str | os.PathLike[str],
    *,
    files: Iterable[str] | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local path of a path, or of a hub id whose `files` are downloaded, all at one commit.

    Of `files` those the repository has, at least one; by default configs, tokenizers and safetensors weights, never
    another format. A hub that cannot be reached leaves what is in the cache, with a warning unless offline is meant.
    Raises CheckpointNotFoundError (for a path), HubError and its kinds.
    """
    path = safe_files.as_path(path_or_id)
    if path.exists():
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
    several = text.count("/") > 1 or os.sep != "/" and os.sep in text
    return text.startswith((".", "/", "~")) or several or (len(path.parts) > 1 and path.parent.exists())


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
            others = ", ".join(
                sorted(n for n in digests if n.endswith((".bin", ".pth", ".h5", ".safetensors")))
            )
            raise FileNotOnHubError(
                f"{repository}: the repository lacks {', '.join(absent)} (it has: {others or 'no weights'}); "
                "only Hugging Face safetensors is read so far."
            )
        _fetch(repository, commit, weights, digests)
    _remember(repository, snapshot)
    return snapshot


def _fetch(
    repository: _Repository, commit: str, names: Sequence[str], digests: Mapping[str, str | None]
) -> Path:
    """Download files of one commit, several at once, and compare the new ones with the SHA-256 the hub announced."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    def fetch(name: str) -> Path:
        where = {"revision": commit, "cache_dir": repository.cache_dir}
        fresh = not isinstance(try_to_load_from_cache(repository.id, name, **where), str)
        path = Path(hf_hub_download(repository.id, name, token=repository.token, **where))
        if fresh and digests[name]:
            _check_digest(path, digests[name], repository)
        return path

    with ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as pool:
        return list(pool.map(fetch, names))[0].parent


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
    if name != snapshot.name and ".." not in name:
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
    missing = (
        [] if wanted is not None else [n for n in _weight_files(snapshot) if not (snapshot / n).exists()]
    )
    if missing:
        raise OfflineError(
            f"{repository}: offline, and the cache lacks {', '.join(missing)} of commit {snapshot.name}; "
            "load it once online."
        )
    return snapshot


def _weight_files(snapshot: Path) -> list[str]:
    """The safetensors files that the index of a snapshot names."""
    if not (snapshot / INDEX).exists():
        return [SINGLE]
    index = strict_json.read_object(snapshot / INDEX, error=CheckpointIndexError, max_bytes=10 << 20)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointIndexError(f"{snapshot / INDEX}: weight_map, a mapping, was expected.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        safe_files.check_bare_name(name, str(snapshot / INDEX))
    return names


# Errors


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _translated(error: Exception, repository: _Repository) -> Exception:
    """The error of this project for one of huggingface_hub, of its HTTP library, or of the system; else itself.

    No text of the server goes into the message: it could repeat the token.
    """
    from huggingface_hub import errors as hf

    if isinstance(error, MistralError):
        return error
    http = sys.modules[
        hf.HfHubHTTPError.__mro__[1].__module__.partition(".")[0]
    ]  # httpx, or httpx2 since 2.0
    kinds: tuple[tuple[type | tuple[type, ...], type[HubError], str], ...] = (
        (hf.HFValidationError, RepoNotFoundError, "neither a path here nor a hub id; check it"),
        (
            hf.GatedRepoError,
            AuthRequiredError,
            "gated: accept its licence on its page, then log in with `hf auth login` or pass token=",
        ),
        (
            hf.RepositoryNotFoundError,
            RepoNotFoundError,
            "no such repository, nor such a path here; check the id, or, if it is private, log in with "
            "`hf auth login` or pass token=",
        ),
        (hf.RevisionNotFoundError, RepoNotFoundError, "no such revision; check the branch, tag or commit"),
        (hf.DisabledRepoError, HubError, "the repository is disabled; see its page"),
        (hf.EntryNotFoundError, FileNotOnHubError, "a file is not in the repository; check the revision"),
        (http.TimeoutException, HubTimeoutError, "the hub did not answer in time; try again"),
        (http.RemoteProtocolError, DownloadCorruptError, "the connection broke off; load again to resume"),
        (
            http.TransportError,
            OfflineError,
            "the hub cannot be reached; check the network, proxy and HF_ENDPOINT",
        ),
        (hf.OfflineModeIsEnabled, OfflineError, "offline mode is on; unset HF_HUB_OFFLINE"),
    )
    chain = list(_chain(error))
    for cause in chain:
        if isinstance(cause, hf.LocalEntryNotFoundError):
            continue  # it only wraps the cause that follows
        for kind, ours, text in kinds:
            if isinstance(cause, kind):
                return ours(f"{repository}: {text}.")
        if isinstance(cause, hf.HfHubHTTPError):
            return _of_status(cause.response, repository)
    return _of_system(error, repository)


def _of_status(response: object, repository: _Repository) -> HubError:
    status, headers = response.status_code, response.headers  # type: ignore[attr-defined]
    if status in (401, 403):
        return AuthRequiredError(
            f"{repository}: refused with {status}; log in with `hf auth login` or pass token=."
        )
    wait = headers.get("Retry-After", "")
    later = f"after {wait} s" if wait.isdigit() else "later"
    return HubError(f"{repository}: the hub answered with status {status}; try again {later}.")


def _of_system(error: Exception, repository: _Repository) -> Exception:
    if "Consistency check failed" in str(error):
        return DownloadCorruptError(f"{repository}: a download has the wrong size; load again.")
    if isinstance(error, OSError) and not isinstance(error, CheckpointError):
        text = error.strerror or type(error).__name__
        return HubError(
            error.errno or 0, f"{repository}: {text}; check the cache directory and its free space."
        )
    return error
