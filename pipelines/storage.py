"""Files wherever they are: local disks, object stores and every fsspec address, through `pyarrow.fs`.

`plan`, `inputs` and `commit` read and write through here and through nothing else.
"""

from __future__ import annotations

import os
import uuid
from typing import NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs

from nanovllm.errors import UserError


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
        """Whether a rename here is atomic and cheap. On object stores it is a copy, and one put is atomic instead."""
        return bool(self.fs.type_name in ("local", "hdfs"))


def _real(place: Location) -> str:
    return os.path.realpath(place.path) if place.fs.type_name == "local" else place.path


def resolve(address: str) -> Location:
    """The location of a local path, a `pyarrow.fs` URI (`s3://`, `gs://`, `hdfs://`, `file://`) or an fsspec address.

    Raises:
        UserError: no installed file system knows the scheme.
    """
    if "://" not in address:
        return Location(pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(address)))
    try:
        fs, path = pafs.FileSystem.from_uri(address)
        return Location(fs, path.rstrip("/") or path)
    except (pa.ArrowInvalid, NotImplementedError, pa.ArrowNotImplementedError) as error:
        reason = str(error)
    try:
        import fsspec

        fs, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise UserError(f"no file system for {address!r}: {_one_line(error) or reason}") from None
    return Location(pafs.PyFileSystem(pafs.FSSpecHandler(fs)), path.rstrip("/"))


def absolute(address: str) -> str:
    """`address` as workers in another directory understand it: local paths become absolute, others stay."""
    return address if "://" in address else os.path.abspath(os.path.expanduser(address))


def _forget_cached(fs: pafs.FileSystem) -> None:
    """Drop what an fsspec file system remembers of listings: other processes write here too."""
    handler = getattr(fs, "handler", None)
    if isinstance(handler, pafs.FSSpecHandler):
        handler.fs.invalidate_cache()


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


def put(place: Location, data: bytes | pa.Buffer, scratch: Location) -> None:
    """Write a file so that readers see all of it or none of it, replacing what was there.

    Where a rename is atomic, the bytes go to a fresh name in the directory `scratch` (same file system), reach the
    disk, and are renamed; elsewhere they are one put.
    """
    if not place.renames:
        with place.fs.open_output_stream(place.path) as stream:
            stream.write(data)
        return
    scratch.fs.create_dir(scratch.path, recursive=True)
    temporary = scratch.child(f"{place.path.rsplit('/', 1)[-1]}.{uuid.uuid4().hex}")
    try:
        with temporary.fs.open_output_stream(temporary.path) as stream:
            stream.write(data)
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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
