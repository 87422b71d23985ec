"""A server that speaks the part of the hub's protocol which its client needs to download a model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """One model, `someone/model`, whose files are those of a directory.

    Attributes:
        sent: bytes of the bodies sent, by file.
        whole: how often a file was sent from its first byte to its last.
    """

    daemon_threads = True

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory = directory
        self.sent: dict[str, int] = {}
        self.whole: dict[str, int] = {}
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        files = {file.name: file for file in self.server.directory.iterdir()}
        if path.startswith(f"/api/models/someone/model/tree/{COMMIT}"):
            entries = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": _digest(file)[:40]}
                for name, file in files.items()
            ]
            return self._say(entries)
        if re.match(r"/api/models/someone/model(/revision/\w+)?$", path):
            siblings = [{"rfilename": name} for name in files]
            return self._say({"id": "someone/model", "sha": COMMIT, "siblings": siblings})
        name = re.match(rf"/someone/model/resolve/(?:main|{COMMIT})/(.+)", path)
        if name and name[1] in files:
            return self._send(name[1], files[name[1]])
        code = "RepoNotFound" if not path.startswith(("/someone/", "/api/models/someone/")) else "EntryNotFound"
        return self._say({"error": "not found"}, 404, code)

    def _say(self, answer: object, status: int = 200, code: str = "") -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _send(self, name: str, file: Path) -> None:
        data = file.read_bytes()
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        end = min(len(data), int(asked[2]) + 1) if asked and asked[2] else len(data)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", f'"{_digest(file)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[start:end])
            with self.server.lock:
                self.server.sent[name] = self.server.sent.get(name, 0) + end - start
                self.server.whole[name] = self.server.whole.get(name, 0) + (end - start == len(data))


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@contextlib.contextmanager
def hub_server(directory: Path) -> Iterator[Hub]:
    """Serve a model directory as `someone/model`."""
    server = Hub(directory)
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=30)
