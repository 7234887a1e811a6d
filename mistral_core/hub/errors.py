"""What the hub refuses, and what fails on the way to it, as errors of this project."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..errors import (
    AuthRequiredError,
    CheckpointError,
    DownloadCorruptError,
    FileNotOnHubError,
    HubError,
    HubTimeoutError,
    MistralError,
    OfflineError,
    RepoNotFoundError,
)


@dataclass(frozen=True)
class Repository:
    """What is asked of the hub; the token is kept out of its text."""

    id: str
    revision: str | None
    cache_dir: str | None
    token: str | bool | None = field(repr=False)

    def __str__(self) -> str:
        return f"{self.id}@{self.revision or 'main'}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def our_error(error: Exception, repository: Repository) -> Exception:
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

    http = _http_library()
    log_in = "log in with `hf auth login` or pass token="
    unknown = f"no such repository, nor such a path here; check the id, or, if it is private, {log_in}"
    gated = f"gated; accept its licence on its page, then {log_in}"
    unreachable = (
        "there is no such path here, and the hub cannot be reached; check the path, or the network, the proxy and "
        "HF_ENDPOINT"
    )
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


def _http_library() -> Any:
    """What huggingface_hub speaks HTTP by, whose errors it lets through; up to its release 1.30 that is httpx."""
    try:
        from huggingface_hub.utils import httpx

        return httpx
    except ImportError:
        return importlib.import_module("httpx")


def _of_status(response: object, repository: Repository) -> HubError:
    status, headers = response.status_code, response.headers  # type: ignore[attr-defined]
    if status in (401, 403):
        return AuthRequiredError(
            f"{repository}: refused with {status}; log in with `hf auth login`, or pass a token= that may do this."
        )
    wait = headers.get("Retry-After", "")
    later = f"after {wait} s" if wait.isdigit() else "later"
    return HubError(f"{repository}: the hub answered with status {status}; try again {later}.")


def _of_system(error: Exception, repository: Repository) -> Exception:
    if "Consistency check failed" in str(error):
        return DownloadCorruptError(f"{repository}: a download has the wrong size; load again.")
    if isinstance(error, OSError) and not isinstance(error, CheckpointError):
        text = error.strerror or type(error).__name__
        return HubError(error.errno or 0, f"{repository}: {text}; check the cache directory and its free space.")
    if isinstance(error, (ValueError, LookupError)):
        return HubError(f"{repository}: the hub's answer cannot be read; check HF_ENDPOINT.")
    return error
