"""An S3 server of the tests' own, and a proxy before it that fails as stores do."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.fs as pafs

BUCKET = "bucket"
UNAVAILABLE = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
)
SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
DENIED = b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
NOBODY = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied.</Message></Error>"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def s3_server(log: Path) -> Iterator[int]:
    """An S3 server (moto) in a process of its own, with one empty bucket. Gives its port on 127.0.0.1."""
    port = free_port()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=stream, stderr=stream
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                request = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
                urllib.request.urlopen(request, timeout=10).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait(timeout=30)


def s3_address(port: int, path: str) -> str:
    return f"s3://{BUCKET}/{path}?endpoint_override=127.0.0.1:{port}&scheme=http"


def upload(directory: Path, address: str) -> None:
    fs, path = pafs.FileSystem.from_uri(address)
    pafs.copy_files(str(directory), path, destination_filesystem=fs)


class FaultyProxy:
    """A proxy on 127.0.0.1 before an HTTP server. Of all requests, `rate` fail in one of several ways, as `seed` says.

    Attributes:
        port: where it listens.
        rate: how many requests fail, 0 to 1.
        away: whether every connection is closed at once.
        signed_only: whether requests without a signature are denied.
        failed: how many requests failed in each way.
        asked: of every request the method, the path and the first byte it asks for.
        hold: says which requests for a path and from a first byte on are not answered.
    """

    def __init__(self, upstream: int, seed: int) -> None:
        self.rate = 0.0
        self.away = False
        self.signed_only = False
        self.failed: dict[str, int] = {}
        self.asked: list[tuple[str, str, int]] = []
        self.hold: Callable[[str, int], bool] = lambda path, first: False
        self._upstream = upstream
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20), self._loop
        ).result(timeout=30)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *exception: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(timeout=30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=30)

    async def _close(self) -> None:
        self._server.close()
        waiting = asyncio.all_tasks() - {asyncio.current_task()}
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request; every connection carries one."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            await self._answer(head, reader, writer)
        writer.close()

    async def _answer(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, path, _ = head.decode("latin-1").split(" ", 2)
        first = re.search(rb"(?i)\r\nrange: bytes=(\d+)", head)
        self.asked.append((method, path, int(first[1]) if first else 0))
        if self.away or self.hold(path, self.asked[-1][2]):
            self._count("away")
            await asyncio.sleep(0 if self.away else 600)
            return
        if self.signed_only and b"\r\nauthorization:" not in head.lower():
            writer.write(DENIED % (len(NOBODY), b"" if head.startswith(b"HEAD") else NOBODY))
            await writer.drain()
            return
        fault = ""
        if self._random.random() < self.rate:
            faults = ["503", "500", "delay", "unanswered"] + (["torn", "torn"] if head.startswith(b"PUT") else [])
            # Each kind comes once before any comes twice, however few requests there are.
            fault = self._random.choice([kind for kind in faults if kind not in self.failed] or faults)
            self._count(fault)
        if fault in ("500", "503"):
            answer = UNAVAILABLE.replace(
                b"503 Slow Down", b"500 Internal Server Error" if fault == "500" else b"503 Slow Down"
            )
            writer.write(answer % (len(SLOW_DOWN), b"" if head.startswith(b"HEAD") else SLOW_DOWN))
            await writer.drain()
            return
        if fault == "torn":  # half of the body reaches the server, which must not make a file of it
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await reader.read(1 << 16)
            _, upstream = await asyncio.open_connection("127.0.0.1", self._upstream)
            upstream.write(head + body[: len(body) // 2])
            await upstream.drain()
            upstream.close()
            return
        if fault == "delay":
            await asyncio.sleep(self._random.uniform(0.1, 1.0))
        await self._forward(head, reader, writer, answered=fault != "unanswered")

    async def _forward(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answered: bool
    ) -> None:
        upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", self._upstream)
        upstream.write(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        body = asyncio.ensure_future(_pump(reader, upstream))
        try:
            if answered:
                await _pump(upstream_reader, writer)
            else:  # what was asked is done, and the answer is lost; the client still wants to be told to go on
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n" if b"100-continue" in head else b"")
                while await upstream_reader.read(1 << 16):
                    pass
        finally:
            body.cancel()
            upstream.close()

    def _count(self, fault: str) -> None:
        self.failed[fault] = self.failed.get(fault, 0) + 1


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()


def credentials() -> dict[str, str]:
    """Environment of a process that may use the server, and asks no cloud for more."""
    return {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
