"""What comes over the wire from a hub: asked for by us, so that it has an end in bytes and in seconds.

A server chooses the bytes of an answer and nothing else: no path, no name, no other scheme. Redirects are followed by
us, from https to https only, and the token goes to no other host.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from .._version import __version__
from ..disk import files, limits
from ..errors import DownloadCorruptError, HubError, HubTimeoutError, LimitExceededError, UnsafeFileError
from .errors import Repository


class Announced(NamedTuple):
    """What the hub says of a file."""

    size: int | None
    sha256: str | None


def listing(repository: Repository) -> tuple[str, dict[str, Announced]]:
    """The commit that a revision means, and the files of it under names that can be file names; others are left out.

    Raises HubError for an answer that is none.
    """
    from huggingface_hub import constants

    revision = f"/revision/{quote(repository.revision, safe='')}" if repository.revision else ""
    url = f"{constants.ENDPOINT}/api/models/{repository.id}{revision}?blobs=true"
    with _answer(url, repository, constants.HF_HUB_ETAG_TIMEOUT) as response:
        text = b"".join(_arriving(response, repository, limits.API_BYTES))
    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise HubError(f"{repository}: the hub's answer cannot be read; check HF_ENDPOINT.") from cause
    commit = told.get("sha") if isinstance(told, dict) else None
    if not is_commit(commit):
        raise HubError(f"{repository}: the hub named no commit; try again.")
    siblings = told.get("siblings") or []
    if not isinstance(siblings, list):
        raise HubError(f"{repository}: the hub's answer has no list of files; check HF_ENDPOINT.")
    limits.check(len(siblings), limits.FILES, what="files of a repository", where=str(repository), error=HubError)
    return str(commit), dict(pair for each in siblings if (pair := _announced(each)))


def is_commit(text: Any) -> bool:
    """Whether this is the name of a commit, 40 hexadecimal digits."""
    return _is_hex(text, 40)


def is_file_name(name: Any) -> bool:
    """Whether a name with slashes is made of plain file names."""
    if not isinstance(name, str) or len(name) > limits.PATH_LETTERS:
        return False
    try:
        for part in name.split("/"):
            files.check_bare_name(part, "")
    except UnsafeFileError:
        return False
    return True


def _is_hex(text: Any, digits: int) -> bool:
    return isinstance(text, str) and len(text) == digits and not set(text) - set("0123456789abcdef")


def _announced(told: Any) -> tuple[str, Announced] | None:
    """One entry of a listing; None for what can be no file."""
    if not isinstance(told, dict) or not is_file_name(told.get("rfilename")):
        return None
    large: dict[str, Any] = told["lfs"] if isinstance(told.get("lfs"), dict) else {}
    size = large.get("size", told.get("size"))
    sha256 = large.get("sha256")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= limits.DOWNLOAD_BYTES:
        size = None
    return told["rfilename"], Announced(size, sha256 if _is_hex(sha256, 64) else None)


def ask_for(repository: Repository, commit: str, name: str) -> str | None:
    """Ask whether the hub would give a file, and how many bytes it says; raises what `download` raises if not."""
    from huggingface_hub import constants

    url = _address(repository, commit, name)
    with _answer(url, repository, constants.HF_HUB_ETAG_TIMEOUT, method="HEAD") as response:
        length: str | None = response.headers.get("Content-Length")
        return length


def _address(repository: Repository, commit: str, name: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repository.id}/resolve/{commit}/{quote(name)}"


def download(repository: Repository, commit: str, name: str, announced: Announced, descriptor: int) -> None:
    """Write a file of a commit into an opened one, going on where an earlier download ended.

    No more than what was announced is taken. Raises DownloadCorruptError, HubError and its kinds, and what the HTTP
    library raises.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import tqdm

    url = _address(repository, commit, name)
    if announced.sha256 is None and announced.size is not None:  # small, and nothing but its size is known of it
        length = ask_for(repository, commit, name)
        if length != str(announced.size):
            raise DownloadCorruptError(
                f"{repository}: {name} has {announced.size} bytes by the hub's listing and {str(length)[:20]!a} when "
                "asked for; load again."
            )
    limit = limits.UNANNOUNCED_BYTES if announced.size is None else announced.size
    begun = os.fstat(descriptor).st_size if announced.sha256 else 0
    if announced.sha256 and begun == announced.size:
        return  # a process died before it compared it
    if begun > limit:
        begun = 0
    asked = {"Range": f"bytes={begun}-"} if begun else {}
    with _answer(url, repository, constants.HF_HUB_DOWNLOAD_TIMEOUT, **asked) as response:
        if not (
            response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {begun}-")
        ):
            begun = 0
        os.ftruncate(descriptor, begun)
        with tqdm(total=announced.size, initial=begun, unit="B", unit_scale=True, desc=name) as bar:
            try:
                for data in _arriving(response, repository, limit - begun):
                    files.write_at(descriptor, data, begun)
                    begun += len(data)
                    bar.update(len(data))
            except LimitExceededError as cause:
                os.ftruncate(descriptor, 0)
                raise DownloadCorruptError(
                    f"{repository}: {name} goes on after the {limit} bytes that the hub announced; load again."
                ) from cause


@contextlib.contextmanager
def _answer(url: str, repository: Repository, seconds: float, *, method: str = "GET", **headers: str) -> Iterator[Any]:
    """An answer, redirects followed, its body still to come; raises huggingface_hub's error of a refusal."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import get_token_to_send, hf_raise_for_status

    session = get_session()
    # not huggingface_hub's own headers: to make them it asks the server for more, without a limit
    headers = {"User-Agent": f"mistral-frameworks/{__version__}", "Accept-Encoding": "identity", **headers}
    if token := get_token_to_send(repository.token):
        headers["Authorization"] = f"Bearer {token}"
    for _ in range(limits.REDIRECTS):
        request = session.build_request(method, url, headers=headers, timeout=seconds)
        send = functools.partial(session.send, request, stream=True, follow_redirects=False)
        response = _in_time(send, repository)
        try:
            if not 300 <= response.status_code < 400:
                if response.status_code >= 400:
                    hf_raise_for_status(_without_body(response))
                yield response
                return
            target = _redirected(url, response.headers.get("Location", ""), repository)
        finally:
            response.close()
        if urlsplit(target).netloc != urlsplit(url).netloc:
            headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
        url = target
    raise HubError(f"{repository}: the hub redirects more than {limits.REDIRECTS} times; check HF_ENDPOINT.")


def _without_body(response: Any) -> Any:
    """A refusal with the few headers that tell why; no text of the server's is read or logged."""
    told = {name: response.headers[name] for name in ("X-Error-Code", "X-Error-Message", "Retry-After")
            if name in response.headers}  # fmt: skip
    return type(response)(response.status_code, headers=told, request=response.request, content=b"")


def _redirected(url: str, location: str, repository: Repository) -> str:
    """Where a redirect leads; raises HubError for another scheme, or an address that is none."""
    try:
        target = urljoin(url, location)
        parts = urlsplit(target)
        allowed = {"https", urlsplit(url).scheme}
        good = parts.scheme in allowed and parts.hostname and not parts.username and target.isascii()
        good = good and target.isprintable() and len(target) <= limits.ADDRESS_LETTERS and parts.port != 0
    except ValueError:
        good = False
    if not location or not good:
        raise HubError(f"{repository}: the hub redirects to {location[:100]!a}, which is refused; check HF_ENDPOINT.")
    return target


def _in_time(start: Callable[[], Any], repository: Repository) -> Any:
    """The head of an answer within its time, however slowly its lines come: the library bounds only each silence."""
    came: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    given_up = threading.Event()

    def run() -> None:
        try:
            response = start()
        except BaseException as error:
            came.put((None, error))
            return
        came.put((response, None))
        if given_up.is_set():
            response.close()

    threading.Thread(target=run, daemon=True).start()
    try:
        response, error = came.get(timeout=limits.HEAD_SECONDS)
    except queue.Empty:
        given_up.set()
        raise HubTimeoutError(f"{repository}: the hub did not answer in {limits.HEAD_SECONDS} s; try again.") from None
    if error is not None:
        raise error
    return response


def bound(response: Any) -> None:
    """Let an answer that huggingface_hub reads have an end as ours have: a hook of its HTTP library.

    Downloads, which other threads may have under way, are left alone.
    """
    http: Any = sys.modules[type(response).__module__.partition(".")[0]]  # httpx or httpx2
    if "/resolve/" in response.request.url.path:
        return

    class Bounded(http.SyncByteStream):
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __iter__(self) -> Iterator[bytes]:
            yield from _within(self.stream, "the hub", limits.API_BYTES)

        def close(self) -> None:
            self.stream.close()

    response.stream = Bounded(response.stream)


def _arriving(response: Any, repository: Repository, limit: int) -> Iterator[bytes]:
    """The body's pieces; raises what `_within` raises."""
    return _within(response.iter_raw(), repository, limit)


def _within(pieces: Iterable[bytes], where: object, limit: int) -> Iterator[bytes]:
    """The pieces; raises LimitExceededError, or HubTimeoutError where fewer bytes come than bear waiting for."""
    came, since, before = 0, time.monotonic(), 0
    for data in pieces:
        came += len(data)
        if came > limit:
            raise LimitExceededError(f"{where}: an answer of more than {limit} bytes; check HF_ENDPOINT.")
        yield data
        now = time.monotonic()
        if now - since > limits.SLOW_SECONDS:
            if came - before < limits.SLOW_SECONDS * limits.SLOW_BYTES:
                raise HubTimeoutError(
                    f"{where}: the hub sends less than {limits.SLOW_BYTES} bytes a second; load again to resume."
                )
            since, before = now, came
