"""Finds and strikes the processes of a job on a cluster of `LocalNodes`, and tells what a job keeps over a kill."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import psutil

from cluster.local_nodes import LocalNodes, Node
from pipelines.commit import OutputDirectory, read_journal
from pipelines.requests import row_seed

ACTOR = "MapBatches("  # in the title Ray gives an actor of a map_batches pool
RANK = "nanovllm.engine.rank_worker"


def named(what: str, members: list[psutil.Process]) -> list[psutil.Process]:
    """Processes with these words in their command line."""
    found = []
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if what in " ".join(member.cmdline()):
                found.append(member)
    return found


def actors(where: LocalNodes | Node) -> list[psutil.Process]:
    """Engine actors of all jobs on a cluster or a node. One that starts still runs under another name."""
    return named(ACTOR, members(where))


def ranks(where: LocalNodes | Node) -> list[psutil.Process]:
    """Tensor-parallel ranks below the engine actors."""
    return named(RANK, members(where))


def members(where: LocalNodes | Node) -> list[psutil.Process]:
    """Processes of a cluster or of a node."""
    if isinstance(where, Node):
        return where.members()
    return [member for node in (where.head, *where.nodes) for member in node.members()]


def suspend(process: psutil.Process) -> None:
    """SIGSTOP, and wait until the process has stopped: what it leaves behind can then be looked at in peace."""
    process.suspend()
    deadline = time.monotonic() + 30
    while process.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline, "it does not stop"
        time.sleep(0.005)


def kept_rows(output: Path, seed: int = 0) -> set[int]:
    """Rows that a kill cannot take any more, by sampling seed: those in files and in journals."""
    place = OutputDirectory(str(output))
    if not (output / "_run" / "job.json").exists():
        return set()
    kept: set[int] = set()
    shards = place.shards()
    # Journals first: between the two looks a shard may be committed and its journal dropped, not the other way round.
    journals = {shard.index: read_journal(place.journal(shard.index), shard.rows) for shard in shards}
    committed = place.committed()
    for shard in shards:
        positions = range(shard.rows) if shard.index in committed else journals[shard.index]
        kept.update(row_seed(seed, shard.file, shard.first_row + position, 0) for position in positions)
    return kept
