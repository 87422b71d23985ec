"""Models that are no local directory: fetched once a node, whatever number of engines it has, and looked at by the driver without weights.

The driver calls `look`; each actor calls `Source.fetch` with the source that the driver looked at. In a node's cache are

    NAME-VERSION/             a fetched model; the version stands for the address and the names, sizes and times of its files
    NAME-VERSION.part/        one that is being fetched: whole files, and at most one `FILE.part` that goes on at its byte
    NAME-VERSION.outline/     what a driver looks at: small files whole, of the weights only both ends, with a hole between
    NAME-VERSION.lock         held (flock) by the process that fetches; its death lets go of it, and the next one goes on
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs

from nanovllm import UserError
from nanovllm.utils import hub
from nanovllm.utils.hub import SMALL_FILES, WEIGHTS, index_names
from pipelines.processes import boot
from pipelines.storage import Location, absolute, children, resolve, retrying, split_query

if TYPE_CHECKING:
    from pipelines.job import JobConfig

SUMS = "SHA256SUMS"
EDGE_BYTES = 1 << 20  # of each end of a weight file, what a job's identity is made of
CHUNK_BYTES = 32 << 20  # of one request: long against its start
READERS = 8  # requests at a time: one does not fill a network card
MEND_SUMS = f"upload it again, or mend {SUMS}"


class StoredFile(NamedTuple):
    """A file of a model on a store; `mtime_ns` is 0 where the store keeps none."""

    name: str
    size: int
    mtime_ns: int


class Source(NamedTuple):
    """A model as a driver saw it, for the nodes that fetch it.

    Attributes:
        model: address, or hub id.
        version: of an address, digest of the listing; of a hub id, the commit.
        files: at an address; none of a hub id, whose client knows them.
        weights: whether an engine reads the weights (`load_format=dummy` does not).
        cache: directory of the node's cache; None for the user's own.
    """

    model: str
    version: str
    files: tuple[StoredFile, ...]
    weights: bool
    cache: str | None

    def fetch(self, retries: int) -> str:
        """The directory with the model on this machine, fetched where it is not there yet.

        Whoever comes second waits for the first. A store that fails is asked again, as often as `retries` says.

        Raises:
            UserError: it cannot be fetched, has changed since the driver looked at it, or is damaged.
        """
        try:
            directory = self._fetch_from_hub(retries) if self.of_hub else self._fetch_from_store(retries)
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"model {self.model!r} cannot be fetched into {_root(self.cache)}: {_one_line(error)}"
            ) from None
        return str(directory)

    @property
    def of_hub(self) -> bool:
        """Whether the model is a hub id."""
        return not is_address(self.model)

    def _fetch_from_hub(self, retries: int) -> Path:
        def ask() -> Path:
            with _hub_errors(self.model):
                return hub.fetch(self.model, self.weights, self.version, _hub_cache(self.cache))

        # The hub's client goes on with what broke off, and checks sizes and hashes; the lock keeps a node to one download.
        with _locked(self.place("lock")):
            return retrying(ask, retries)

    def _fetch_from_store(self, retries: int) -> Path:
        whole, begun = self.place(), self.place("part")
        if self._is_whole(whole):
            return whole
        with _locked(self.place("lock")):
            if self._is_whole(whole):
                return whole
            began = time.monotonic()
            target = whole if whole.is_dir() else begun  # a whole one that was damaged is mended where it is
            _forget_torn(target)
            place = resolve(self.model)
            small = [file for file in self.files if not file.name.endswith(WEIGHTS)]
            sums = _fetch_files(place, small, target, {}, retries)
            missing = [file for file in self._needed(target) if not _has(target, file)]
            _check_room(self.model, target, missing)
            size = sum(file.size for file in missing)
            _say(f"fetching {self.model} into {whole}: {size / 1e9:,.2f} GB")
            _fetch_files(place, missing, target, sums, retries)
            if retrying(lambda: _listing(place), retries) != self.files:
                shutil.rmtree(begun, ignore_errors=True)
                raise UserError(f"model {self.model!r} has changed since the job looked at it; start the job again")
            if target == begun:
                begun.rename(whole)
                _sync(whole.parent)
            seconds = max(0.001, time.monotonic() - began)
            _say(f"fetched {self.model} in {seconds:,.1f} s ({size / 1e6 / seconds:,.0f} MB/s)")
        return whole

    def _is_whole(self, directory: Path) -> bool:
        return directory.is_dir() and all(_has(directory, file) for file in self._needed(directory))

    def _needed(self, directory: Path) -> list[StoredFile]:
        """The files an engine reads: of the weights those that the index names, where there is one."""
        named = index_names(directory)
        return [
            file
            for file in self.files
            if not file.name.endswith(WEIGHTS) or (self.weights and (named is None or file.name in named))
        ]

    def place(self, end: str = "") -> Path:
        """In this machine's cache: the fetched model, or what has its name with another end."""
        kind = "" if self.weights else "-config"
        name = re.sub(r"[^\w.-]", "_", model_name(self.model)) or "model"
        return _root(self.cache) / f"{name}-{self.version}{kind}{end and '.' + end}"


def is_address(model: str) -> bool:
    """Whether `model` is an address like `s3://bucket/model`."""
    return "://" in model


def model_name(model: str) -> str:
    """The last part of a model's path, hub id or address."""
    return split_query(model)[0].rstrip("/").rpartition("/")[2]


def source_of(config: JobConfig) -> Source | None:
    """What the nodes of a job need to fetch its model; None where it is a local directory. Asked while the job runs, so patiently.

    Raises:
        UserError: as `look`.
    """
    run, weights = config.run, config.engine.load_format == "auto"
    with _reaching(config.model):
        return retrying(lambda: _source(config.model, run.model_cache, weights), run.write_retries)


def local_model(model: str, cache: str | None, weights: bool, retries: int) -> str:
    """The directory of `model` on this machine, for an engine without a driver before it.

    Raises:
        UserError: as `look` and `Source.fetch`.
    """
    with _reaching(model):
        source = retrying(lambda: _source(model, cache, weights), retries)
    return source.fetch(retries) if source else model


def look(model: str, cache: str | None, weights: bool = True) -> Path:
    """A directory with which a model can be checked: its own where it is local; else no weights are fetched, only their headers.

    Args:
        model: local directory, address or hub id.
        cache: directory of this machine's cache; None for the user's own.
        weights: whether an engine will read the weights.

    Raises:
        UserError: there is no such model, or it cannot be reached.
    """
    with _reaching(model):
        source = _source(model, cache, weights)
        if source is None:
            return Path(model).expanduser()
        return _look_at_hub(source) if source.of_hub else _look_at_store(source)


def _source(model: str, cache: str | None, weights: bool) -> Source | None:
    if is_address(model):
        return _source_on_store(absolute(model), cache, weights)
    if hub.is_local(model):
        return None
    with _hub_errors(model):
        return Source(model, hub.fetch(model, False, cache_dir=_hub_cache(cache)).name, (), weights, cache)


@contextlib.contextmanager
def _reaching(model: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"model {model!r} cannot be reached: {_one_line(error)}") from None


@contextlib.contextmanager
def named(model: str, directory: Path) -> Iterator[None]:
    """Refusals inside speak of the model as the user gave it, and not of the directory that stands for it."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(str(directory), model)) from None


# Stores


def _source_on_store(model: str, cache: str | None, weights: bool) -> Source:
    files = _listing(resolve(model))
    if not any(file.name == "config.json" for file in files):
        found = f"holds no config.json (found {files[0].name!r})" if files else "does not exist or holds no model"
        raise UserError(f"model {model!r} {found}; give the directory that holds config.json and *.safetensors")
    digest = hashlib.blake2b(json.dumps([model, files]).encode(), digest_size=8).hexdigest()
    return Source(model, digest, files, weights, cache)


def _look_at_store(source: Source) -> Path:
    place = resolve(source.model)

    def draw(directory: Path) -> None:
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(lambda file: _draw_file(place, file, directory / file.name), source.files))

    return _outline(source, draw)


def _outline(source: Source, draw: Callable[[Path], None]) -> Path:
    """An outline of a model: it passes the checks that the model itself passes. `draw` fills the directory where there is none."""
    outline = source.place("outline")
    if not outline.is_dir():
        with _locked(source.place("outline.lock")):
            if not outline.is_dir():
                fresh = source.place("outline.part")
                shutil.rmtree(fresh, ignore_errors=True)
                fresh.mkdir(parents=True)
                draw(fresh)
                for path in fresh.iterdir():
                    _sync(path)  # else a power cut could leave empty files under the final name
                fresh.rename(outline)
    return outline


def _listing(place: Location) -> tuple[StoredFile, ...]:
    """The files of a model's directory that an engine may read, by name."""
    return tuple(
        StoredFile(entry.base_name, entry.size or 0, entry.mtime_ns or 0)
        for entry in children(place)
        if entry.type == pafs.FileType.File
        and (entry.base_name.endswith((*SMALL_FILES, WEIGHTS)) or entry.base_name == SUMS)
    )


def _draw_file(place: Location, file: StoredFile, target: Path) -> None:
    where = place.child(file.name)
    with target.open("wb") as copy:
        if not file.name.endswith(WEIGHTS) or file.size <= 2 * EDGE_BYTES:
            copy.write(_read(where, 0, file.size))
            return
        head = _read(where, 0, EDGE_BYTES)
        header = 8 + struct.unpack("<Q", head[:8])[0]  # may be nonsense, which the checks will say
        if EDGE_BYTES < header <= file.size:
            head += _read(where, EDGE_BYTES, header - EDGE_BYTES)
        copy.write(head)
        copy.truncate(file.size)
        copy.seek(file.size - EDGE_BYTES)
        copy.write(_read(where, file.size - EDGE_BYTES, EDGE_BYTES))


def _read(place: Location, offset: int, size: int) -> bytes:
    """So many bytes of a file, no fewer."""
    with place.fs.open_input_file(place.path) as stream:
        found: bytes = stream.read_at(size, offset)
    if len(found) != size:
        raise OSError(f"{place.path} gave {len(found)} of the {size} bytes from {offset} on")
    return found


def _fetch_files(
    place: Location, files: Sequence[StoredFile], target: Path, sums: dict[str, str], retries: int
) -> dict[str, str]:
    """Fetch what is missing of some files. A wrong hash is believed when it comes twice.

    Returns:
        The hashes that `SHA256SUMS` gives, where it is among them; else `sums`.
    """
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(files, key=lambda file: file.name != SUMS):
        if not _has(target, file) and not any(_fetch_file(place, file, target, sums, retries) for _ in range(2)):
            raise UserError(f"{file.name} of the model at {place.path} has not the SHA-256 of {SUMS}; {MEND_SUMS}")
        if file.name == SUMS:
            sums = _read_sums(target / SUMS)
    return sums


def _fetch_file(place: Location, file: StoredFile, target: Path, sums: dict[str, str], retries: int) -> bool:
    """Fetch the rest of one file, and give it its name when it is whole. False where its hash is wrong, and it is gone."""
    unfinished = target / f"{file.name}.part"
    if unfinished.exists() and unfinished.stat().st_size > file.size:
        unfinished.unlink()
    digest = hashlib.sha256() if file.name in sums else None
    with unfinished.open("ab+", buffering=0) as copy:
        if digest:
            copy.seek(0)
            while piece := copy.read(CHUNK_BYTES):
                digest.update(piece)
        for chunk in _chunks(place.child(file.name), copy.seek(0, os.SEEK_END), file.size, retries):
            if digest:
                digest.update(chunk)
            _write(copy.fileno(), chunk)
        os.fsync(copy.fileno())
    if digest and digest.hexdigest() != sums[file.name]:
        _say(f"{file.name} has not the SHA-256 of {SUMS}")
        unfinished.unlink()
        return False
    unfinished.rename(target / file.name)
    return True


def _chunks(place: Location, start: int, end: int, retries: int) -> Iterator[bytes]:
    """The bytes of a file from `start` on, in order; some requests are under way at a time.

    Raises:
        OSError: the store refused, after `retries` retries, or the file is shorter than it was.
    """

    pending: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(READERS, thread_name_prefix="model") as pool:
        try:
            for offset in range(start, end, CHUNK_BYTES):
                ask = partial(_read, place, offset, min(CHUNK_BYTES, end - offset))
                pending.append(pool.submit(retrying, ask, retries))
                if len(pending) == READERS:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _write(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _read_sums(path: Path) -> dict[str, str]:
    """Hashes by name, as `sha256sum` writes them."""
    lines = (
        re.fullmatch(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)", line)
        for line in path.read_text("utf-8", "replace").splitlines()
    )
    return {line[2]: line[1].lower() for line in lines if line}


def _has(directory: Path, file: StoredFile) -> bool:
    try:
        return (directory / file.name).stat().st_size == file.size
    except OSError:
        return False


def _forget_torn(target: Path) -> None:
    """Drop partial files that another boot of this machine left: of what is not synced, a power cut keeps the length alone."""
    target.mkdir(parents=True, exist_ok=True)
    mark = target / ".boot"
    try:
        now = boot()
    except OSError:
        now = ""
    if not now or not mark.exists() or mark.read_text() != now:
        for torn in target.glob("*.part"):
            torn.unlink()
        mark.write_text(now)


def _check_room(model: str, target: Path, missing: Sequence[StoredFile]) -> None:
    there = sum(path.stat().st_size for path in target.glob("*.part"))
    wanted, free = sum(file.size for file in missing) - there, shutil.disk_usage(target).free
    if wanted > free:
        raise UserError(
            f"model {model!r} needs {wanted / 1e9:,.1f} GB more in {target.parent}, which has {free / 1e9:,.1f} GB free; "
            "make room, or set run.model_cache to a larger disk"
        )


# The hub


def _look_at_hub(source: Source) -> Path:
    with _hub_errors(source.model):
        small = hub.fetch(source.model, False, source.version, _hub_cache(source.cache))
        names = index_names(small)
        if names is None and not list(small.glob(f"*{WEIGHTS}")):
            from huggingface_hub import HfApi

            found = HfApi().list_repo_files(source.model, revision=source.version)
            names = [name for name in found if name.endswith(WEIGHTS) and "/" not in name]
        if not source.weights or all((small / name).is_file() for name in names or ()):
            return small  # all is here, or there is nothing more to fetch
        return _outline(source, lambda directory: _draw_from_hub(source, small, names or (), directory))


def _draw_from_hub(source: Source, small: Path, names: Sequence[str], directory: Path) -> None:
    from huggingface_hub import HfApi

    for path in small.iterdir():
        if path.is_file() and path.name.endswith(SMALL_FILES):
            shutil.copyfile(path, directory / path.name)

    def draw(name: str) -> None:
        read = HfApi().parse_safetensors_file_metadata(source.model, name, revision=source.version)
        tensors = {
            key: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
            for key, info in read.tensors.items()
        }
        header = json.dumps(tensors).encode()
        with (directory / name).open("wb") as copy:
            copy.write(struct.pack("<Q", len(header)) + header)
            copy.truncate(8 + len(header) + max((info.data_offsets[1] for info in read.tensors.values()), default=0))

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(draw, (name for name in names if "/" not in name)))


@contextlib.contextmanager
def _hub_errors(model: str) -> Iterator[None]:
    """What the hub's client raises, of many kinds: as `UserError` where asking again would not help, else as `OSError`."""
    try:
        yield
    except Exception as error:
        from huggingface_hub import constants

        what = f"it is no local directory and cannot be fetched from the hub: {hub.reason(error)}"
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if constants.HF_HUB_OFFLINE or (400 <= status < 500 and status not in (408, 429)):
            raise UserError(f"model {model!r}: {what}") from None
        raise OSError(what) from None


def _hub_cache(cache: str | None) -> str | None:
    return None if cache is None else str(_root(cache) / "hub")


# The node's cache


def _root(cache: str | None) -> Path:
    if cache is not None:
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nanovllm" / "models"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file. Whatever ends the process lets go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        import fcntl  # which Windows has not

        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
