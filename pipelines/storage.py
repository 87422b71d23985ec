"""Files wherever they are: local disks, object stores and every fsspec address, through `pyarrow.fs`.

`plan`, `inputs` and `commit` read and write through here and through nothing else.
"""

from __future__ import annotations

import functools
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs

from nanovllm.errors import UserError

T = TypeVar("T")

# Types of `pyarrow.fs` and protocols of fsspec that have no directories, and where a file appears whole when it is closed.
OBJECT_STORES = {"s3", "s3a", "gcs", "gs", "abfs", "abfss", "az", "adl", "oci", "oss", "memory"}
QUERY = re.compile(r"\?[\w-]+=[^?&]*(&[\w-]+=[^?&]*)*$")
PASSWORD = re.compile(r"://[^/@]*:[^/@]*@")


class Location(NamedTuple):
    """A path on one file system. `/` separates the parts everywhere."""

    fs: pafs.FileSystem
    path: str

    def child(self, *parts: str) -> Location:
        """The location `parts` below this one."""
        return Location(self.fs, "/".join((self.path.rstrip("/"), *parts)))

    def contains(self, other: Location) -> bool:
        """Whether `other` is this place or lies below it."""
        here, there = (_real(place).rstrip("/") for place in (self, other))
        same_store = bool(self.fs.type_name == other.fs.type_name)
        return same_store and (there + "/").startswith(here + "/")

    @property
    def renames(self) -> bool:
        """Whether a rename is what makes a file appear whole. On object stores it is a copy, and a put is atomic instead."""
        fsspec_fs = _fsspec_of(self.fs)
        protocol = self.fs.type_name if fsspec_fs is None else fsspec_fs.protocol
        return OBJECT_STORES.isdisjoint((protocol,) if isinstance(protocol, str) else protocol)

    @property
    def appends(self) -> bool:
        """Whether what is flushed to an open file is there, whatever becomes of the process."""
        return bool(self.fs.type_name in ("local", "hdfs"))


def _real(place: Location) -> str:
    return os.path.realpath(place.path) if place.fs.type_name == "local" else place.path


def resolve(address: str) -> Location:
    """The location of a local path, a `pyarrow.fs` URI (`s3://`, `gs://`, `hdfs://`, `file://`) or an fsspec address.

    Raises:
        UserError: no installed file system knows the scheme, or it does not understand the address.
    """
    if "://" not in address:
        return Location(pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(address)))
    place, query = split_query(address)
    # Spaces and the brackets and question marks of a glob: a URI has no room for them in a path.
    uri = quote(place, safe="%:/#@!$&'()*+,;=~") + query
    if address.startswith("s3://") and "allow_delayed_open=" not in query:
        # What fits into one part is then one request and not three, and a process that is killed leaves no upload open.
        uri += ("&" if query else "?") + "allow_delayed_open=true"
    try:
        fs, path = pafs.FileSystem.from_uri(uri)
        return Location(fs, path.rstrip("/") or path)
    except (pa.ArrowInvalid, NotImplementedError, pa.ArrowNotImplementedError) as error:
        reason = _one_line(error)
    try:
        import fsspec

        fs, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        known = "Unrecognized filesystem type" not in reason
        raise UserError(f"no file system for {address!r}: {reason if known else _one_line(error) or reason}") from None
    return Location(pafs.PyFileSystem(_FsspecHandler(fs)), path.rstrip("/"))


def absolute(address: str) -> str:
    """`address` as workers in another directory understand it: local paths become absolute, others stay.

    Raises:
        UserError: it holds a password, which would end up in `config.yaml`, reports and messages.
    """
    if PASSWORD.search(address):
        raise UserError(
            f"the address {PASSWORD.sub('://***@', address)!r} holds credentials, which would be stored with the job; leave "
            "them out and give them in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_... for fsspec)"
        )
    return address if "://" in address else os.path.abspath(os.path.expanduser(address))


def split_query(address: str) -> tuple[str, str]:
    """An address without its query, and the query with its question mark; local paths have none."""
    match = QUERY.search(address) if "://" in address else None
    return (address[: match.start()], match[0]) if match else (address, "")


def _as_os_error(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, with whatever it raises as an `OSError`."""

    @functools.wraps(call)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        try:
            return call(*arguments, **named)
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error

    return wrapped


class _FsspecStream:
    """An open file of fsspec whose failures are `OSError`s."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._stream, name)
        return _as_os_error(value) if callable(value) else value


class _FsspecHandler(pafs.FSSpecHandler):
    """fsspec for pyarrow, where a failure is an `OSError` and never looks like an empty directory or a missing file.

    fsspec's libraries raise kinds of their own, and its `exists`, `isdir` and `find`, which pyarrow's handler calls, take
    every failure for "not there".
    """

    @_as_os_error
    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        infos: list[pafs.FileInfo] = super().get_file_info(paths)
        return infos

    @_as_os_error
    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        try:
            entries = self.fs.ls(selector.base_dir, detail=True)
        except FileNotFoundError:
            if selector.allow_not_found:
                return []
            raise
        infos = []
        for entry in entries:
            path = entry["name"].rstrip("/")
            if path.strip("/") == selector.base_dir.strip("/"):
                continue  # stores with placeholders for directories list the directory itself
            infos.append(self._create_file_info(path, entry))
            if selector.recursive and entry["type"] == "directory":
                infos += self.get_file_info_selector(pafs.FileSelector(path, allow_not_found=True, recursive=True))
        return infos

    create_dir = _as_os_error(pafs.FSSpecHandler.create_dir)
    delete_dir = _as_os_error(pafs.FSSpecHandler.delete_dir)
    move = _as_os_error(pafs.FSSpecHandler.move)

    @_as_os_error
    def delete_file(self, path: str) -> None:
        self.fs.rm(path)

    @_as_os_error
    def open_input_stream(self, path: str) -> pa.PythonFile:
        return pa.PythonFile(_FsspecStream(self.fs.open(path, mode="rb")), mode="r")

    open_input_file = open_input_stream

    @_as_os_error
    def open_output_stream(self, path: str, metadata: object) -> pa.PythonFile:
        return pa.PythonFile(_FsspecStream(self.fs.open(path, mode="wb")), mode="w")


def _fsspec_of(fs: pafs.FileSystem) -> Any:
    """The fsspec file system behind one of pyarrow, or None."""
    handler = getattr(fs, "handler", None)
    return handler.fs if isinstance(handler, pafs.FSSpecHandler) else None


def _forget_cached(fs: pafs.FileSystem) -> None:
    """Drop what an fsspec file system remembers of listings: other processes write here too."""
    fsspec_fs = _fsspec_of(fs)
    if fsspec_fs is not None:
        fsspec_fs.invalidate_cache()


def kind(place: Location) -> pafs.FileType:
    """Whether `place` is a file, a directory or nothing."""
    _forget_cached(place.fs)
    return place.fs.get_file_info(place.path).type


def exists(place: Location) -> bool:
    """Whether `place` is a file."""
    return bool(kind(place) == pafs.FileType.File)


def children(place: Location) -> list[pafs.FileInfo]:
    """Files and directories directly in `place`, sorted by path; none where it does not exist."""
    _forget_cached(place.fs)
    entries = place.fs.get_file_info(pafs.FileSelector(place.path, allow_not_found=True))
    return sorted(entries, key=lambda entry: str(entry.path))


def read(place: Location) -> bytes:
    """The whole content of a file."""
    _forget_cached(place.fs)
    with place.fs.open_input_stream(place.path) as stream:
        return bytes(stream.read())


def put(place: Location, data: bytes | pa.Buffer | Iterable[bytes], scratch: Location) -> None:
    """Write a file so that readers see all of it or none of it, replacing what was there.

    Where a rename is atomic, the bytes go to a fresh name in the directory `scratch` (same file system), reach the
    disk, and are renamed; elsewhere they are one put. Pieces are taken one after another, so that a file may be larger than
    memory; where there is no rename and one of them fails, what came before it may stay.
    """
    pieces = [data] if isinstance(data, (bytes, pa.Buffer)) else data
    if not place.renames:
        with place.fs.open_output_stream(place.path) as stream:
            for piece in pieces:
                stream.write(piece)
        return
    scratch.fs.create_dir(scratch.path, recursive=True)
    temporary = scratch.child(f"{place.path.rsplit('/', 1)[-1]}.{uuid.uuid4().hex}")
    try:
        with temporary.fs.open_output_stream(temporary.path) as stream:
            for piece in pieces:
                stream.write(piece)
        _sync(temporary)
        place.fs.move(temporary.path, place.path)
        _sync(Location(place.fs, place.path.rsplit("/", 1)[0]))
    except BaseException:
        delete_file(temporary)
        raise


def _sync(place: Location) -> None:
    """Wait until a local file or directory is on the disk, so that a power cut after a rename loses nothing."""
    if place.fs.type_name != "local":
        return
    handle = os.open(place.path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def delete_file(place: Location) -> None:
    """Remove a file; nothing happens where there is none."""
    try:
        place.fs.delete_file(place.path)
    except OSError:
        if exists(place):
            raise


def delete_tree(place: Location) -> None:
    """Remove a directory and what is in it; nothing happens where there is none."""
    try:
        place.fs.delete_dir(place.path)
    except OSError:
        if kind(place) == pafs.FileType.Directory:
            raise


def retrying(write: Callable[[], T], retries: int, sleep: Callable[[float], None] = time.sleep) -> T:
    """Call `write` until it succeeds, waiting 1, 2, 4 ... seconds (at most 30) after each `OSError`.

    Raises:
        OSError: the last failure, after `retries` retries.
    """
    for attempt in range(retries):
        try:
            return write()
        except OSError:
            sleep(pause_s(attempt))
    return write()


def pause_s(attempt: int) -> float:
    """How long `retrying` waits after a failed attempt, counted from 0."""
    return min(30.0, 2.0**attempt)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
