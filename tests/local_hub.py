"""A hub on this machine: the routes of it that downloads and uploads need."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import struct
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
from huggingface_hub import constants

from mistral_core.hub import download
from mistral_core.weights import sources

COMMIT = "a" * 40
ENTRY_NOT_FOUND = {"X-Error-Code": "EntryNotFound"}


COMMITTED = "c" * 40
RESET = "reset"
LARGE = (".safetensors", ".bin", ".h5", ".gguf", ".msgpack")


class Hub(BaseHTTPRequestHandler):
    """The routes of the hub that matter; `server.fault(path)` may answer first, or say RESET."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.requests.append((self.command, path, self.headers.get("Authorization")))
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.fault(path)
        if fault == RESET:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
            self.close_connection = True
            return
        status, headers, body = fault or (
            self.taken(path, sent) if self.command in ("POST", "PUT") else self.answer(path)
        )
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if int(headers.get("Content-Length", len(body))) != len(body):
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self, path):
        files, past = self.server.files, self.server.past
        repositories = self.server.repositories
        repository = next((r for r in repositories if path.startswith((f"/{r}/", f"/api/models/{r}"))), "")
        if path.startswith("/api/models/"):
            if not repository:
                return 404, {"X-Error-Code": "RepoNotFound"}, b""
            revision = path.partition("/revision/")[2]
            commit, files = (revision, past[revision]) if revision in past else (self.server.commit, files)
            siblings = [sibling(name, data) for name, data in files.items()]
            return 200, {}, json.dumps({"id": repository, "sha": commit, "siblings": siblings}).encode()
        commit, _, name = path.removeprefix(f"/{repository}/resolve/").partition("/")
        files = files if commit == self.server.commit else past.get(commit, {})
        if name not in files:
            return 404, ENTRY_NOT_FOUND, b""
        etag = hashlib.sha256(files[name]).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, files[name]

    def taken(self, path, sent):
        """The answer to an upload's request, in the order in which they come."""
        server = self.server
        if self.command == "PUT":
            oid = path.rpartition("/")[2]
            server.blobs[oid] = sent
            return (200 if hashlib.sha256(sent).hexdigest() == oid else 400), {}, b""
        asked = [json.loads(line) for line in sent.splitlines()]
        if path == "/api/repos/create":
            repository = "/".join(filter(None, (asked[0]["organization"] or "someone", asked[0]["name"])))
            if repository in server.repositories:
                return 409, {}, json.dumps({"url": f"{server.url}/{repository}"}).encode()
            server.repositories += (repository,)
            server.created.append(asked[0])
            return 200, {}, json.dumps({"url": f"{server.url}/{repository}"}).encode()
        if path == "/api/validate-yaml":
            return 200, {}, b"{}"
        if "/branch/" in path:
            server.branches.append(path.rpartition("/")[2])
            return 201, {}, b""
        if "/preupload/" in path:
            modes = [
                {"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in asked[0]["files"]
            ]
            return 200, {}, json.dumps({"files": modes}).encode()
        if path.endswith("/objects/batch"):
            objects = [self.uploading(each["oid"], each["size"]) for each in asked[0]["objects"]]
            return 200, {}, json.dumps({"transfer": "basic", "objects": objects}).encode()
        return self.committed(path, asked)

    def uploading(self, oid, size):
        upload = {"upload": {"href": f"{self.server.url}/upload/{oid}"}}
        return {"oid": oid, "size": size, **({} if oid in self.server.blobs else {"actions": upload})}

    def committed(self, path, lines):
        server, (header, *files) = self.server, lines
        found = {}
        for line in files:
            value = line["value"]
            found[value["path"]] = server.blobs[value["oid"]] if "oid" in value else base64.b64decode(value["content"])
        server.commits.append(
            {"revision": path.rpartition("/")[2], "message": header["value"]["summary"], "files": found}
        )
        server.files, server.commit = {**server.files, **found}, COMMITTED
        repository = path.removeprefix("/api/models/").partition("/commit/")[0]
        told = {"commitUrl": f"{server.url}/{repository}/commit/{COMMITTED}", "commitOid": COMMITTED}
        return 200, {}, json.dumps({**told, "pullRequestUrl": f"{server.url}/{repository}/discussions/1"}).encode()

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    """Quiet about clients that hang up."""

    def handle_error(self, *_):
        pass


def mode(name):
    return "lfs" if name.endswith(LARGE) else "regular"


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
        server.past = {}  # commit -> files, of commits that the branch has left
        server.blobs, server.commits, server.created, server.branches = {}, [], [], []
        server.fault = lambda path: None
        url = server.url = f"http://127.0.0.1:{server.server_port}"
        template = "{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{template}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
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


def resolved(repository, files=None, **arguments):
    """What is downloaded: files by their names, or without names those of a checkpoint."""
    if files is None:
        return sources.resolve_checkpoint(repository, **arguments)
    return download.resolve(repository, files, **arguments)
