"""Addresses, and files that are whole or not there, on stores of every kind."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm import UserError
from pipelines.inputs import list_dataset
from pipelines.storage import (
    Location,
    absolute,
    children,
    delete_file,
    delete_tree,
    exists,
    kind,
    put,
    read,
    resolve,
    split_query,
)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("s3://b/x", ("s3://b/x", "")),
        ("s3://b/x?region=r", ("s3://b/x", "?region=r")),
        ("s3://b/?.parquet?scheme=http&a=b:1", ("s3://b/?.parquet", "?scheme=http&a=b:1")),
        ("s3://b/x?.parquet", ("s3://b/x?.parquet", "")),
        ("s3://b/x?e=http://h:1&scheme=http", ("s3://b/x", "?e=http://h:1&scheme=http")),
        ("/data/day?=a", ("/data/day?=a", "")),
        ("/data/x?a=b", ("/data/x?a=b", "")),
    ],
)
def test_query_of_an_address(address: str, parts: tuple[str, str]) -> None:
    assert split_query(address) == parts


def test_globs_of_addresses(tmp_path: Path) -> None:
    for name in ("a1.csv", "a2.csv", "b1.csv", "c 1.csv"):
        (tmp_path / name).write_text("prompt\nx\n")
    assert [file.path for file in list_dataset(f"file://{tmp_path}/a?.csv").files] == ["a1.csv", "a2.csv"]
    assert [file.path for file in list_dataset(f"file://{tmp_path}/[bc]?1.csv").files] == ["c 1.csv"]
    assert resolve("s3://bucket/a b/[c]?d?region=us-east-1").path == "bucket/a b/[c]?d"


@pytest.mark.parametrize("address", ["s3://key:very-secret@b/x", "sftp://me:very-secret@host/x"])
def test_addresses_with_credentials_are_refused(address: str) -> None:
    with pytest.raises(UserError, match="holds credentials") as refused:
        absolute(address)
    assert "very-secret" not in str(refused.value)


@pytest.mark.parametrize("address", ["s3://b/x", "gs://anonymous@b/x", "sftp://me@host:22/x", "s3://b/x@y:z@w"])
def test_addresses_without_credentials_stay(address: str) -> None:
    assert absolute(address) == address


def test_what_an_address_lacks_is_said() -> None:
    with pytest.raises(UserError, match="Unexpected query parameter in S3 URI: 'regoin'"):
        resolve("s3://b/x?regoin=r")


def places(tmp_path: Path) -> list[Location]:
    """A directory on a disk, on a disk through fsspec, and on a store without directories."""
    below = tmp_path / "fsspec"
    return [
        resolve(str(tmp_path / "local")),
        resolve(f"dir::file://{below}"),
        resolve(f"memory://{uuid.uuid4().hex}/x"),
    ]


def test_files_come_and_go(tmp_path: Path) -> None:
    for place in places(tmp_path):
        scratch = place.child("tmp")
        assert children(place) == []
        if place.renames:
            place.fs.create_dir(place.path, recursive=True)
        for data in (b"first", b"second"):
            put(place.child("file"), data, scratch)
            assert read(place.child("file")) == data
        put(place.child("file"), (letter for letter in (b"th", b"", b"ird")), scratch)
        assert read(place.child("file")) == b"third"
        assert [entry.base_name for entry in children(place) if entry.base_name != "tmp"] == ["file"]
        assert children(scratch) == []
        assert exists(place.child("file"))
        assert not exists(place.child("other"))
        with pytest.raises(FileNotFoundError):
            read(place.child("other"))
        delete_file(place.child("file"))
        delete_file(place.child("file"))
        assert not exists(place.child("file"))
        delete_tree(place)
        delete_tree(place)
        assert children(place) == []


TORN = """
import resource, signal, sys
from pipelines.storage import put, resolve
place = resolve(sys.argv[1])
place.fs.create_dir(place.path, recursive=True)
put(place.child("file"), b"old", place.child("tmp"))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    put(place.child("file"), bytes(200_000), place.child("tmp"))
except OSError as error:
    print(error.strerror or error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs limits on the size of files")
@pytest.mark.parametrize("scheme", ["", "dir::file://"])
def test_a_write_that_is_cut_leaves_the_old_file(tmp_path: Path, scheme: str) -> None:
    address = f"{scheme}{tmp_path}/store"
    done = subprocess.run([sys.executable, "-c", TORN, address], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    place = resolve(address)
    assert read(place.child("file")) == b"old"
    assert children(place.child("tmp")) == []


def test_pieces_that_end_early_leave_the_old_file(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"new"
        raise OSError("a shard cannot be read")

    place = resolve(str(tmp_path / "store"))
    place.fs.create_dir(place.path, recursive=True)
    put(place.child("file"), b"old", place.child("tmp"))
    with pytest.raises(OSError, match="a shard"):
        put(place.child("file"), pieces(), place.child("tmp"))
    assert read(place.child("file")) == b"old"
    assert children(place.child("tmp")) == []


def test_a_store_that_cannot_be_reached_is_not_an_empty_one() -> None:
    place = resolve("webhdfs://127.0.0.1:1/data")  # nothing listens there
    for ask in (children, kind, exists, read, delete_file, delete_tree):
        with pytest.raises(OSError, match="onnect") as failed:
            ask(place)
        assert not isinstance(failed.value, FileNotFoundError)
    with pytest.raises(OSError, match="onnect"):
        put(place.child("file"), b"x", place.child("tmp"))
