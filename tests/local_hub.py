"""A hub on this machine: the two routes of it that matter."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
from huggingface_hub import constants

COMMIT = "a" * 40
ENTRY_NOT_FOUND = {"X-Error-Code": "EntryNotFound"}


class Hub(BaseHTTPRequestHandler):
    """The two routes of the hub that matter; `server.fault(path)` may answer first."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.requests.append((self.command, path, self.headers.get("Authorization")))
        status, headers, body = self.server.fault(path) or self.answer(path)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
        if int(headers.get("Content-Length", len(body))) != len(body):
            self.close_connection = True

    do_HEAD = do_GET

    def answer(self, path):
        files = self.server.files
        repositories = self.server.repositories
        repository = next((r for r in repositories if path.startswith((f"/{r}/", f"/api/models/{r}"))), "")
        if path.startswith("/api/models/"):
            siblings = [sibling(name, data) for name, data in files.items()]
            return 200, {}, json.dumps({"id": repository, "sha": self.server.commit, "siblings": siblings}).encode()
        name = path.removeprefix(f"/{repository}/resolve/{self.server.commit}/")
        if name not in files:
            return 404, ENTRY_NOT_FOUND, b""
        etag = hashlib.sha256(files[name]).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": self.server.commit}, files[name]

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    """Quiet about clients that hang up."""

    def handle_error(self, *_):
        pass


def sibling(name, data):
    entry = {"rfilename": name, "size": len(data), "blobId": "0" * 40}
    if name.endswith((".safetensors", ".bin")):
        entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
    return entry


@contextmanager
def serving(files, repositories, monkeypatch):
    """A server whose `repositories` all hold `files`, and huggingface_hub turned to it."""
    with Server(("127.0.0.1", 0), Hub) as server:
        server.files, server.repositories, server.commit, server.requests = dict(files), repositories, COMMIT, []
        server.fault = lambda path: None
        url = f"http://127.0.0.1:{server.server_port}"
        template = "{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{template}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            huggingface_hub.close_session()
