"""The model hub: an id becomes a local directory of one commit; a local path stays what it is."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ..disk import files as safe_files
from ..disk import reading
from ..errors import (
    CheckpointNotFoundError,
    DownloadCorruptError,
    FileNotOnHubError,
    HubError,
    HubTimeoutError,
    MistralError,
    OfflineError,
)
from .hub_errors import Repository, translated
from .hub_files import CONFIGS, HEADS, heads, small_files, weight_files

ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only")

_DOWNLOADS_AT_ONCE = 4


class _Announced(NamedTuple):
    """What the hub says of a file."""

    size: int | None
    sha256: str | None


def resolve(
    path_or_id: safe_files.PathLike,
    *,
    files: Iterable[str] | None = None,
    format: str | None = None,
    one_format: bool = False,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local path of a path, or of a hub id whose `files` are downloaded, all at one commit.

    Of `files` those the repository has, at least one; by default configs, tokenizers and the weights of one format:
    `format`, else the one that is there, `hf` of several unless there should be `one_format`. Where the hub does not
    answer, a complete copy in the cache is used, with a warning unless offline is what was asked for.
    Raises CheckpointNotFoundError (for a path), ConversionError (several formats), HubError and its kinds.
    """
    path = safe_files.as_path(path_or_id)
    if path_or_id and os.path.exists(path):
        return path
    if not isinstance(path_or_id, str) or _looks_like_path(path_or_id, path):
        raise CheckpointNotFoundError(f"{path}: no such file or directory; check the path.")
    cache = os.path.expanduser(cache_dir) if cache_dir is not None else None
    repository = Repository(path_or_id, revision, cache, token)
    wanted = tuple(files) if files is not None else None
    for part in (part for name in wanted or () for part in name.split("/")):
        safe_files.check_bare_name(part, path_or_id)
    from huggingface_hub import constants

    try:
        if local_files_only or constants.HF_HUB_OFFLINE:
            return _cached(repository, wanted, format, one_format)
        return _download(repository, wanted, format, one_format)
    except Exception as error:
        failure = translated(error, repository)
        if failure is error:
            raise
        snapshot = None
        if type(failure) in (HubError, HubTimeoutError, OfflineError):
            with contextlib.suppress(OfflineError):
                snapshot = _cached(repository, wanted, format, one_format)
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


def _download(repository: Repository, wanted: Sequence[str] | None, format: str | None, one: bool) -> Path:
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
    announced = {
        file.rfilename: _Announced(file.lfs.size, file.lfs.sha256) if file.lfs else _Announced(file.size, None)
        for file in info.siblings or ()
    }
    if wanted is None:
        first = heads(announced, format, str(repository), one=one)
        names = small_files(announced, first)
    else:
        names = [name for name in wanted if name in announced]
    if not names and wanted is not None:
        raise FileNotOnHubError(f"{repository}: the repository has none of {', '.join(wanted)}; check the id.")
    snapshot = _fetch(repository, commit, names, announced) if names else None
    if wanted is None:
        weights = weight_files(snapshot, announced, first)
        absent = [name for name in weights if name not in announced]
        if absent:
            raise FileNotOnHubError(f"{repository}: the repository lacks {', '.join(absent)}, which {first[0]} names.")
        snapshot = _fetch(repository, commit, weights, announced)
    assert snapshot is not None  # one of the two fetched something
    _remember(repository, snapshot)
    return snapshot


def _fetch(repository: Repository, commit: str, names: Sequence[str], announced: Mapping[str, _Announced]) -> Path:
    """Download files of one commit and compare the new ones with the size and SHA-256 that the hub announced."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    def fetch(name: str) -> Path:
        cache = repository.cache_dir
        fresh = not isinstance(try_to_load_from_cache(repository.id, name, cache, commit), str)
        path = Path(hf_hub_download(repository.id, name, revision=commit, cache_dir=cache, token=repository.token))
        if not path.is_file():
            raise HubError(f"{repository}: in the cache {path} is no file; remove it and load again.")
        if fresh:
            _check(path, announced[name], repository)
        return path

    with ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as pool:
        paths = list(pool.map(fetch, names))
    return paths[0].parents[names[0].count("/")]


def _check(path: Path, expected: _Announced, repository: Repository) -> None:
    """Remove a file that is not what was announced, and raise DownloadCorruptError."""
    size, sha256 = path.stat().st_size, expected.sha256
    if sha256 is not None:
        sha256 = reading.sha256(path)
    if sha256 != expected.sha256 or size != (size if expected.size is None else expected.size):
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise DownloadCorruptError(
            f"{repository}: {path.name} arrived with {size} bytes and SHA-256 {sha256}, the hub announced "
            f"{expected.size} and {expected.sha256}; it was removed, load again."
        )


def _remember(repository: Repository, snapshot: Path) -> None:
    """Note which commit a branch or tag meant, as the hub's own cache does, for the next time offline."""
    name = repository.revision or "main"
    if name != snapshot.name and re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name) and ".." not in name:
        with contextlib.suppress(MistralError):  # a read-only cache is no reason to fail
            safe_files.write_file(snapshot.parent.parent / "refs" / name, snapshot.name.encode())


def _cached(repository: Repository, wanted: Sequence[str] | None, format: str | None, one: bool) -> Path:
    """The snapshot in the cache, or OfflineError with what it lacks."""
    names = (*CONFIGS, *HEADS) if wanted is None else tuple(wanted)
    found = next(((path, name) for name in names if (path := _in_cache(repository, name))), None)
    if found is None:
        tried = CONFIGS if wanted is None else names
        raise OfflineError(
            f"{repository}: offline, and the cache has none of {', '.join(tried)}; "
            "load it once online or check cache_dir."
        )
    snapshot = found[0].parents[found[1].count("/")]
    if wanted is None:
        present = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
        weights = weight_files(snapshot, present, _heads_in_cache(repository, snapshot, present, format, one))
        missing = [name for name in weights if name not in present]
        if missing:
            raise _incomplete(repository, snapshot, ", ".join(missing))
    return snapshot


def _heads_in_cache(
    repository: Repository, snapshot: Path, present: Collection[str], format: str | None, one: bool
) -> list[str]:
    try:
        return heads(present, format, str(repository), one=one)
    except FileNotOnHubError as cause:
        lacking = "weights" if format is None else f"weights of the format {format}"
        raise _incomplete(repository, snapshot, lacking) from cause


def _incomplete(repository: Repository, snapshot: Path, missing: str) -> OfflineError:
    return OfflineError(
        f"{repository}: offline, and the cache lacks {missing} of commit {snapshot.name}; load it once online."
    )


def _in_cache(repository: Repository, name: str) -> Path | None:
    """A file of the revision in the cache; raises OfflineError for a cache that is not in order."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repository.id, name, repository.cache_dir, repository.revision)
    except (UnicodeError, OSError) as cause:
        raise OfflineError(
            f"{repository}: offline, and the cache cannot be read ({type(cause).__name__}); remove the repository's "
            "directory there and load it once online."
        ) from cause
    return Path(found) if isinstance(found, str) else None
