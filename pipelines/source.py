"""Shards as a Ray Data source: one task of the cluster streams the plan, a block for each shard, while engines work already.

Used by the job's driver. A block put there one by one costs the driver a millisecond before anything runs, 45 s for 40,000 shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
from ray.data import Dataset, Datasource, ReadTask, read_datasource
from ray.data.block import BlockMetadata
from ray.data.context import DataContext

from pipelines.plan import Shard, shards_to_table


class ShardSource(Datasource):
    """The shards of a job, in the order of the plan, each a block of one row as in `SHARD_SCHEMA` (`file` a plain string)."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        super().__init__()
        table = shards_to_table(shards)
        files = table.schema.get_field_index("file")
        # A slice of a dictionary column takes the whole dictionary with it.
        self._table: pa.Table = table.set_column(files, "file", table["file"].cast(pa.string()))

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of the plan."""
        return int(self._table.nbytes)

    def get_read_tasks(self, parallelism: int, *arguments: Any, **options: Any) -> list[ReadTask]:
        """The task that streams the shards."""
        table = self._table

        def blocks() -> Iterator[pa.Table]:
            for number in range(table.num_rows):
                yield table.slice(number, 1)

        size = BlockMetadata(num_rows=table.num_rows, size_bytes=table.nbytes, exec_stats=None, input_files=None)
        return [ReadTask(blocks, size)]


def stream_shards(shards: Sequence[Shard]) -> Dataset:
    """A dataset of one-row blocks. It makes Ray Data join no blocks, in the whole process.

    The task needs no CPU: where engines hold all of them it must run too.
    """
    DataContext.get_current().target_max_block_size = 1  # bytes; less than any row, so that every row is a block
    return read_datasource(ShardSource(shards), num_cpus=0, override_num_blocks=1)


def in_flight(shards: int, min_actors: int, max_actors: int, most: int) -> tuple[int, int]:
    """How many shards an actor works on at a time, and how many it may be given, where `shards` are left.

    What an actor is given nobody takes from it again. Where there are few shards each is given no more than its share, or the
    engine that is ready first would have them all before the others are. Otherwise one waits at each actor, which is also what
    lets a pool grow.
    """
    share = max(1, -(-shards // max(1, min_actors)))
    at_once = min(most, share)
    return at_once, share if share <= most and min_actors == max_actors else at_once + 1
