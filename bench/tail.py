"""How a job's end looks with 1 to 1,000 engines: the pipeline's own plan and hand-out, engines as events; no Ray, seconds of CPU.

`python bench/tail.py --save tail_cpu`. Engines are those of `pipeline.py` (slots that a row holds for some steps, first come, first
served), but time is counted and not waited for, so that a thousand fit one core. `plan.make_shards` cuts the shards and
`source.in_flight` says how many an engine holds: what one was given nobody takes from it again. Left out: what starting, reading,
committing and the driver take. `short` is the law of lengths and the job of `pipeline.py --sections full`, whose figures check this
one; `seed` is that of the seed workload.

    ideal      steps if all slots were busy to the end
    makespan   steps until the last row; its excess over the ideal is the tail, which longer jobs have once, too
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
from common import save

from pipelines.inputs import FileFacts, InputFile
from pipelines.job import build
from pipelines.plan import make_shards
from pipelines.source import in_flight


class Case(NamedTuple):
    """A kind of job: slots of an engine, its rows, how they are cut into shards, and the law of the rows' steps."""

    slots: int
    rows: int  # an engine
    shard_rows: int | str
    group: int  # rows of the file's row groups, where shards rather end; 0: one group
    steps_of: Callable[[random.Random], int]


def short(rng: random.Random) -> int:
    """Nine in ten rows take 10 to 50 steps, one in ten 150 to 350; as in `pipeline.py`."""
    return rng.randint(150, 350) if rng.random() < 0.1 else rng.randint(10, 50)


def seed(rng: random.Random) -> int:
    """100 to 1,024 steps, all as likely."""
    return rng.randint(100, 1024)


CASES = {
    "short": Case(32, 20 * 64, 64, 0, short),
    "seed": Case(256, 3072, 256, 512, seed),  # the rows, the file and the shards of `scaling.py`
    "seed, auto": Case(256, 3072, "auto", 512, seed),
}


class Engine:
    """Slots, the shards it holds, and their rows that wait for a slot."""

    def __init__(self, slots: int, speed: float) -> None:
        self.free, self.speed = slots, speed
        self.working = 0
        self.given: deque[tuple[int, int]] = deque()  # shards (number, rows) that have not begun
        self.waiting: deque[list[int]] = deque()  # shards in flight: [number, rows without a slot]


def simulate(shards: list[int], engines: int, case: Case, spread: float, chance: int = 0) -> dict[str, Any]:
    """A job of shards of so many rows.

    Args:
        spread: engines' speeds lie evenly from 1 - spread to 1 + spread.
        chance: seed of the rows' lengths.
    """
    rng = random.Random(chance)
    at_once, most = in_flight(len(shards), engines, engines, 8)
    left, queue = list(shards), iter(enumerate(shards))
    speeds = [1 + spread * (2 * number / (engines - 1) - 1) if engines > 1 else 1.0 for number in range(engines)]
    pool = [Engine(case.slots, speed) for speed in speeds]
    running: list[tuple[float, int, int]] = []  # (when it ends, engine, shard) of each row that has a slot
    busy = end = 0.0

    def fill(number: int, now: float) -> None:
        nonlocal busy
        engine = pool[number]
        while engine.working < at_once and engine.given:
            engine.waiting.append(list(engine.given.popleft()))
            engine.working += 1
        while engine.free and engine.waiting:
            shard = engine.waiting[0]
            taken = min(engine.free, shard[1])
            for _ in range(taken):
                steps = case.steps_of(rng)
                busy += steps
                heapq.heappush(running, (now + steps / engine.speed, number, shard[0]))
            engine.free -= taken
            shard[1] -= taken
            if not shard[1]:
                engine.waiting.popleft()

    for _ in range(most):  # handed out in turn
        for engine, first in zip(pool, itertools.islice(queue, engines), strict=False):
            engine.given.append(first)
    for number in range(engines):
        fill(number, 0.0)
    while running:
        end, number, shard = heapq.heappop(running)
        engine = pool[number]
        engine.free += 1
        left[shard] -= 1
        if not left[shard]:
            engine.working -= 1
            engine.given.extend(itertools.islice(queue, 1))
        if engine.waiting or engine.given:
            fill(number, end)
    assert not any(left)
    ideal = busy / engines / case.slots
    return {
        "ideal_steps": round(ideal, 1),
        "makespan_steps": round(end, 1),
        "tail_steps": round(end - ideal, 1),
        "slot_use_to_the_end": round(ideal / end, 4),
        "of_ideal": round(end / ideal, 3),
    }


def shards_of(case: Case, engines: int) -> list[int]:
    """Rows of each shard of a job of one Parquet file."""
    config = build(
        {
            "model": "none",
            "input": "none",
            "output": "none",
            "engine": {"device": "cpu", "max_num_seqs": case.slots},
            "run": {"replicas": engines, "shard_rows": case.shard_rows},
        }
    )
    rows = case.rows * engines
    ends = [*range(case.group or rows, rows, case.group or rows), rows]
    facts = FileFacts(pa.schema([("prompt", pa.string())]), ends, None, 0)
    return [shard.rows for shard in make_shards(config, [InputFile("rows.parquet", 1, 0)], [facts])]


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each case, spread and number of engines."""
    for name in args.cases:
        for longer, spread, engines in itertools.product(args.longer, args.spread, args.engines):
            case = CASES[name]._replace(rows=round(CASES[name].rows * longer))
            shards = shards_of(case, engines)
            start = time.perf_counter()
            figures = simulate(shards, engines, case, spread)
            yield {
                "case": name,
                "engines": engines,
                "spread": spread,
                "rows": sum(shards),
                "shards": len(shards),
                **figures,
                "cpu_s": round(time.perf_counter() - start, 1),
            }


def main() -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 2, 8, 100, 1000])
    parser.add_argument("--spread", type=float, nargs="+", default=[0.0, 0.05], help="of the engines' speeds")
    parser.add_argument("--longer", type=float, nargs="+", default=[1.0], help="times the case's rows of an engine")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    args = parser.parse_args()
    rows = []
    for row in measure(args):
        print(json.dumps(row), flush=True)
        rows.append(row)
    if args.save:
        print(save(args.save, {"benchmark": "tail", "runs": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
