"""A checkpoint to the hub: its own files and no others, in one commit."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..disk import files, limits, reading
from ..disk.into import MANIFEST
from ..disk.names import CONFIG_FILES, TEXT_FILES, VISION_FILES, template_names
from ..errors import CheckpointError, HubError, MistralError
from ..hub import wire
from ..hub.errors import Repository, our_error
from . import formats, manifest
from .containers.shards import weight_map_of
from .opening import Checkpoint
from .sources import PRESET_FILES

SILENCE_SECONDS = 300.0
"""How long the hub may say nothing; making a commit takes it a while."""

COMPANIONS = (*CONFIG_FILES, *TEXT_FILES, *VISION_FILES, "README.md")
"""What goes along with weights where it is there."""

_KERAS_HUB = (*PRESET_FILES, "model.weights.json")
_ZARR = (".zarray", ".zattrs", ".zgroup")


def push_to_hub(
    directory: files.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
) -> str:
    """Upload the checkpoint in a directory, and return the address of the commit.

    The repository and the branch `revision` are made if they are not there; `private` (None: as the account has it)
    is for a new one. Only the checkpoint's own files are sent: weights, configs, tokenizer, manifest, README, licence.
    Raises what opening a checkpoint raises, ChecksumMismatchError or TruncatedFileError where it is not what its
    manifest says, HubError and its kinds.
    """
    checkpoint = Checkpoint.open(files.as_path(directory))
    manifest.verify(checkpoint.directory, "sizes")
    message = commit_message or f"Upload {_class(checkpoint)} as {checkpoint.format}"
    options: dict[str, Any] = {"private": private, "revision": revision, "token": token, "create_pr": create_pr}
    return push_files(_contents(checkpoint), repo_id, message, **options)


def push_files(
    contents: Mapping[str, Path | bytes],
    repo_id: str,
    message: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
) -> str:
    """Upload files, by their names in the repository, in one commit; as `push_to_hub` does."""
    if create_pr and revision not in (None, "main"):
        raise HubError(f"{repo_id}: a pull request is made to main, not to {revision!r}; leave one of the two out.")
    repository = Repository(repo_id, revision, None, token)
    try:
        with _in_time():
            return _commit(repository, contents, message, private=private, create_pr=create_pr)
    except Exception as error:
        failure = _failure(error, repository)
        if failure is error:
            raise
        raise failure from error


def save_and_push(save: Callable[[Path], object], repo_id: str, **options: Any) -> str:
    """Let `save` write a checkpoint into a directory that is pushed and removed; `options` are `push_to_hub`'s."""
    with tempfile.TemporaryDirectory() as folder, files.errors_named_for(Path(folder) / "model", repo_id):
        save(Path(folder) / "model")
        return push_to_hub(Path(folder) / "model", repo_id, **options)


def files_of(checkpoint: Checkpoint) -> list[str]:
    """The names of a checkpoint's files, below its directory: what is pushed."""
    folder = checkpoint.directory
    weights = {Path(path).absolute().relative_to(folder.absolute()).as_posix() for path in checkpoint.shards}
    found = {name for name in weights if not _is_debris(name)}
    found |= {name for name in (*COMPANIONS, MANIFEST) if (folder / name).is_file()}
    found |= {*template_names(folder), *_indexes(folder, weights)}
    if checkpoint.format == "keras-hub":
        assets = reading.files_below(folder / "assets") if (folder / "assets").is_dir() else ()
        found |= {f"assets/{name}" for name in assets if not _is_debris(f"assets/{name}")}
        found |= {name for name in _KERAS_HUB if (folder / name).is_file()}
    return sorted(found)


def _is_debris(name: str) -> bool:
    """Whether a file is hidden or a lock; zarr's own are neither."""
    parts = name.split("/")
    return name.endswith(".lock") or any(part.startswith(".") and part not in _ZARR for part in parts)


def _indexes(folder: Path, weights: set[str]) -> Iterator[str]:
    """The indexes that name exactly these weights."""
    for name in {name for row in formats.FORMATS.values() for name in row.files if name.endswith(".index.json")}:
        with contextlib.suppress(CheckpointError):  # another format's, and not in order
            if (folder / name).is_file() and set(weight_map_of(folder / name, "")[0].values()) == weights:
                yield name


def _contents(checkpoint: Checkpoint) -> dict[str, Path | bytes]:
    """Name in the repository -> file, or its content; the manifest lists what is there and nothing else."""
    folder = checkpoint.directory
    weights = {checkpoint.name_of(path) for path in checkpoint.shards}  # opened as files of the directory already
    contents: dict[str, Path | bytes] = {
        name: folder / name if name in weights else reading.read(folder / name, limit=limits.TEXT_BYTES)
        for name in files_of(checkpoint)
    }
    if MANIFEST in contents:
        described = manifest.read(folder)
        kept = {name: entry for name, entry in described["files"].items() if name in contents}
        if kept != described["files"]:
            contents[MANIFEST] = json.dumps({**described, "files": kept}, indent=1, sort_keys=True).encode()
    return contents


def _class(checkpoint: Checkpoint) -> str:
    return (checkpoint.config.architectures or ("a Mistral",))[0]


def _commit(
    repository: Repository,
    contents: Mapping[str, Path | bytes],
    message: str,
    *,
    private: bool | None,
    create_pr: bool,
) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=repository.token)
    full_id = _own(api.create_repo(repository.id, private=private, exist_ok=True).repo_id, repository)
    if repository.revision not in (None, "main") and not create_pr:
        api.create_branch(full_id, branch=str(repository.revision), exist_ok=True)
    made = api.create_commit(
        full_id,
        [CommitOperationAdd(name, content) for name, content in contents.items()],
        commit_message=message,
        revision=repository.revision,
        create_pr=create_pr,
    )
    return _address(made.commit_url, full_id)


def _own(full_id: str, repository: Repository) -> str:
    """The id that the hub gives a repository, if it is the one that was asked for, with its owner."""
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(full_id)
    if full_id != repository.id and full_id.partition("/")[2] != repository.id:
        raise HubError(f"{repository}: the hub answers with another repository, {full_id[:100]!a}; check HF_ENDPOINT.")
    return full_id


def _address(told: object, full_id: str) -> str:
    """The address of a commit as the hub tells it, or of the repository where that is no address of the hub's."""
    from huggingface_hub import constants

    url = str(told)
    good = url.startswith(f"{constants.ENDPOINT}/") and url.isascii() and url.isprintable() and " " not in url
    return url if good and len(url) <= limits.PATH_LETTERS else f"{constants.ENDPOINT}/{full_id}"


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    """Bound each answer, and the waiting for it, which huggingface_hub leaves open."""
    from huggingface_hub import get_session

    session = get_session()
    before, hooks = session.timeout, session.event_hooks
    session.timeout = SILENCE_SECONDS
    session.event_hooks = {**hooks, "response": [*hooks.get("response", ()), wire.bound]}
    try:
        yield
    finally:
        session.timeout, session.event_hooks = before, hooks


def _failure(error: Exception, repository: Repository) -> Exception:
    """The error of this project for what stopped an upload; no text of the server goes into it."""
    if isinstance(error, OSError) and error.filename is not None and not isinstance(error, MistralError):
        return CheckpointError(error.errno, f"{error.filename}: cannot be read ({error.strerror}); push again.")
    if isinstance(error, ValueError) and "README.md" in str(error):
        return HubError(f"{repository}: the hub refuses the metadata at the top of README.md; correct it.")
    failure = our_error(error, repository)
    if failure is error and not isinstance(error, MistralError):
        return HubError(f"{repository}: the upload failed ({type(error).__name__}); push again.")
    return failure
