"""Sorting more rows than fit in memory, in files: sorted runs, each with an index, and ranges of keys that all runs are read for.

Used by `routing`, whose tasks write runs and read ranges on any node. Keys are bytes, in the column `KEY`; they compare as bytes do.
Where every run says at regular places which keys it has, splitting at these keeps ranges near equal whatever the keys are (parallel
sorting by regular sampling, Shi and Schaeffer, 1992).
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.row_values import take
from pipelines.storage import Location, put

KEY = "_key"
INDEX = b"first keys and rows of the batches"
READ_THREADS = 8
Key = bytes | None  # None: before all keys, or after them


class Mark(NamedTuple):
    """A batch of a run: its first key, and how many rows it has."""

    key: bytes
    rows: int


def write_run(place: Location, scratch: Location, table: pa.Table, batch_rows: int) -> None:
    """Sort a table by its `KEY` and write it as a run, in batches that can be read one by one. Equal keys keep their order.

    Raises:
        OSError: the store refused.
    """
    batches = sort(table).combine_chunks().to_batches(max_chunksize=batch_rows)
    index = [(batch[KEY][0].as_py().hex(), batch.num_rows) for batch in batches]
    schema = table.schema.with_metadata({INDEX: json.dumps(index)})
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd", unify_dictionaries=True)
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        writer.write_table(pa.Table.from_batches([batch.replace_schema_metadata() for batch in batches], table.schema))
    put(place, sink.getvalue(), scratch)


def read_marks(run: Location) -> list[Mark]:
    """The batches of a run, from its index."""
    with run.fs.open_input_file(run.path) as stream:
        return _marks(pa.ipc.open_file(stream))


def splitters(marks: Sequence[Sequence[Mark]], ranges: int) -> list[bytes]:
    """Keys that cut all runs into so many ranges of about as many rows, or fewer. `marks` has those of each run."""
    every = sorted(mark for run in marks for mark in run)
    total = sum(mark.rows for mark in every)
    found: list[bytes] = []
    before = 0
    for mark in every:
        if before * ranges >= total * (len(found) + 1) and (not found or mark.key > found[-1]):
            found.append(mark.key)
        before += mark.rows
    return found


def read_range(runs: Sequence[Location], low: Key, high: Key) -> pa.Table:
    """The rows of all runs from the key `low` on and before `high`, sorted; of equal keys those of earlier runs come first.

    Raises:
        OSError, pa.ArrowException: a run cannot be read.
    """
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return sort(pa.concat_tables(pool.map(lambda run: _read(run, low, high), runs)))


def sort(table: pa.Table) -> pa.Table:
    """A table in the order of its `KEY`; equal keys keep their order."""
    order = pc.sort_indices(table[KEY]).to_numpy()
    if np.array_equal(order, np.arange(len(order))):
        return table
    return pa.table([take(column, order) for column in table.columns], schema=table.schema)


def _read(run: Location, low: Key, high: Key) -> pa.Table:
    with run.fs.open_input_file(run.path) as stream:
        file = pa.ipc.open_file(stream)
        firsts = [mark.key for mark in _marks(file)]
        # The batch before the first that begins with `low` may end with it.
        begin = 0 if low is None else max(0, bisect_left(firsts, low) - 1)
        end = len(firsts) if high is None else bisect_left(firsts, high)
        schema = file.schema.remove_metadata()
        batches = [file.get_batch(number).replace_schema_metadata() for number in range(begin, end)]
    table = pa.Table.from_batches(batches, schema)
    keys = table[KEY].to_pylist()
    start = 0 if low is None else bisect_left(keys, low)
    return table.slice(start, (len(keys) if high is None else bisect_left(keys, high)) - start)


def _marks(file: pa.RecordBatchFileReader) -> list[Mark]:
    return [Mark(bytes.fromhex(key), rows) for key, rows in json.loads(file.schema.metadata[INDEX])]
