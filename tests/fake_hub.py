"""A server on loopback with the part of the hub's protocol that downloads need; it can also misbehave."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = hashlib.sha1(b"commit").hexdigest()


class FakeHub:
    """One repository. Large files (in LFS) are redirected to another origin, as the hub does.

    Attributes
    ----------
    files
        Name -> content, as listed with its checksum.
    sent
        Name -> content, where something else is sent.
    refused
        Kind of request (``api``, ``resolve`` or ``cdn``) -> status and headers of every answer to such.
    cut
        Name -> how many bytes the first request for it gets; then the server is as good as dead until `revive`.
    stall
        Name of a file of which half is sent, and the rest never; ``stalled`` is set then.
    requests
        (kind, name, headers) of all requests.
    bytes_sent
        Name -> bytes of content that were sent.
    """

    def __init__(self, model: str, files: dict[str, bytes]):
        self.model, self.files = model, files
        self.sent: dict[str, bytes] = {}
        self.refused: dict[str, tuple[int, dict[str, str]]] = {}
        self.cut: dict[str, int] = {}
        self.stall: str | None = None
        self.stalled, self.over = threading.Event(), threading.Event()
        self.dead = False
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.bytes_sent: dict[str, int] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that hang up
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()

    def revive(self) -> None:
        self.dead, self.stall = False, None
        self.requests.clear()
        self.bytes_sent.clear()

    def asked(self, kind: str) -> list[str]:
        return [name for found, name, _ in self.requests if found == kind]

    def listing(self) -> bytes:
        siblings = []
        for name, content in self.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"rfilename": name, "size": len(content), "blobId": blob}
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        return json.dumps({"id": self.model, "modelId": self.model, "sha": COMMIT, "siblings": siblings}).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # Nagle's algorithm would delay every body until the headers are acknowledged
    hub: FakeHub

    def log_message(self, *_):
        pass

    def do_GET(self):
        hub = self.hub
        url = urlsplit(self.path)
        kind, name = self.route(unquote(url.path))
        hub.requests.append((kind, name, {key.lower(): value for key, value in self.headers.items()}))
        if hub.dead:
            self.close_connection = True
        elif kind in hub.refused:
            status, headers = hub.refused[kind]
            self.answer(status, b"<html>no</html>", headers)
        elif kind == "api":
            assert parse_qs(url.query)["blobs"][0].lower() == "true"
            self.answer(200, hub.listing(), {"Content-Type": "application/json"})
        elif name not in hub.files:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif kind == "resolve" and name.endswith(".safetensors"):
            self.answer(302, b"", {"Location": f"http://localhost:{hub.server.server_port}/cdn/{name}"})
        else:
            self.send_file(name)

    def route(self, path):
        if path.startswith(f"/api/models/{self.hub.model}"):
            return "api", path.partition("/revision/")[2]
        if path.startswith(f"/{self.hub.model}/resolve/{COMMIT}/"):
            return "resolve", path.partition(f"/resolve/{COMMIT}/")[2]
        if path.startswith("/cdn/"):
            return "cdn", path.removeprefix("/cdn/")
        return "unknown", path

    def answer(self, status, content, headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)

    def send_file(self, name):
        hub = self.hub
        content = hub.sent.get(name, hub.files[name])
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        rest = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if name in hub.cut:
            rest = rest[: hub.cut.pop(name)]
            hub.dead = self.close_connection = True
        elif name == hub.stall:
            rest = rest[: len(rest) // 2]
        hub.bytes_sent[name] = hub.bytes_sent.get(name, 0) + len(rest)
        self.wfile.write(rest)
        if name == hub.stall:
            self.wfile.flush()
            hub.stalled.set()
            self.close_connection = hub.over.wait(60)
