"""A report of a job that never ran, for its page and its bounds: many actors with a history of deaths and starts.

Everything but the engines is real: the history hears what a board says, second by second of a clock of its own.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pipelines.counts import Counts, ErrorSample, error_kind
from pipelines.history import History
from pipelines.job import build
from pipelines.progress import Progress, WorkerState
from pipelines.report import build_report
from pipelines.storage import resolve

EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


class Clock:
    """Seconds of a start."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def worker(number: int, up_s: float, *, life: int = 0, gpu: str = "NVIDIA H200", actor: str = "") -> WorkerState:
    """What a process says `up_s` after it began; it loads for 12 s and then runs steadily."""
    pace = 0.55 if number == 3 else max(0.2, 1 - 0.01 * number)
    busy = max(0.0, up_s - 12)
    return WorkerState(
        finished_rows=int(270 * busy * pace),
        input_tokens=int(30_000 * pace * busy),
        generated_tokens=int(24_000 * pace * (busy + 4 * math.sin(busy / 20 + number))) if busy else 0,
        cached_tokens=int(30_000 * pace * busy * (0.82 - 0.3 * math.exp(-busy / 60))),
        running=256 if busy else 0,
        waiting=300 if busy else 0,
        kv_usage=min(0.93, busy / 60) * pace,
        flushed=False,
        stalled_s=0.0,
        node=f"{number // 8:056x}",
        pid=1000 * (life + 1) + number,
        birth=str(life),
        actor=actor or f"actor{number}",
        host=f"gpu-node-{number // 8 + 1}.cluster.example",
        gpu=gpu,
        gpus=1.0 if gpu else 0.0,
        up_s=round(up_s, 2),
        load_s=12.0,
    )


def job(directory: Path, model: Path, actors: int = 24, seconds: int = 1800, earlier: int = 2) -> dict[str, Any]:
    """The report of the last of some starts. Actor 5 dies and comes back, 7 hangs, 9 is gone for good."""
    place = resolve(str(directory / "history"))
    for start in range(earlier):
        history, clock = history_of(place, f"start{start}")
        history.begin()
        for second in range(0, 400 + 200 * start, 5):
            clock.now = float(second)
            history.look([(0.5, worker(number, second)) for number in range(4)])
        history.note("retry", "shard 17 (rows 0 to 999 of part-1.parquet), attempt 2, after: its process vanished")
        if start % 2 == 0:
            history.note("stopping", "told to stop; workers flush their journals")
            history.end("stopped", "by SIGTERM or Ctrl-C")
        else:
            history.write()  # and then it was killed

    history, clock = history_of(place, "last")
    history.begin()
    progress = Progress(12_000_000, 2_000_000, 1e9, stream=(directory / "lines").open("w"))
    samples = []
    for second in range(0, seconds + 1, 2):
        clock.now = float(second)
        states = []
        for number in range(actors):
            died = 600.0 if number in (5, 7) else 900.0 if number == 9 else math.inf
            states.append((max(0.4, second - died), worker(number, min(second, died))))
            if number in (5, 7) and second > died + 25:
                states.append((0.4, worker(number, second - died - 25, life=1)))
        history.look(states)
        if second == 600:
            history.note("death", "pid 1005: CUDA error: an illegal memory access was encountered " + EVIL, "a6")
            history.note("hang", "a8 pid 1007 hung and was killed", "a8")
        if second == 640:
            for shard in range(6):
                history.note("retry", f"shard {shard} (rows 0 to 999 of x.parquet), attempt 2, after: CUDA error")
        progress.sample(states)
        samples.append(progress._recent[-1]._replace(seconds=float(second)))
    history.note("failed", "shard 40 (x.parquet rows 5 to 9): Parquet page is torn")
    history.end("failed", "11,900,000 of 12,000,000 rows are done")
    return build_report(
        status="failed",
        config=build(
            {
                "model": str(model),
                "input": "s3://bucket/prompts/",
                "output": "s3://bucket/a-directory-with-a-rather-long-name/output-2026-11-30",
                "prompt": {"template": f"{EVIL} {{{{ text }}}}"},
                "engine": {"load_format": "dummy", "max_num_seqs": 256},
            }
        ).as_dict(),
        counts=counts(),
        total_rows=12_000_000,
        seconds=float(seconds),
        resumed_rows=2_000_000,
        reused_rows=1_234,
        copied_rows=0,
        samples=[sample._asdict() for sample in samples[:: max(1, len(samples) // 900)]],
        shards=[],
        failures={f"{EVIL}.parquet rows 5 to 9": "Parquet page is torn " + EVIL, "y" * 300: "x" * 500},
        starts=history.starts(),
        actors=history.actors(),
    )


def history_of(place: Any, name: str) -> tuple[History, Clock]:
    """A history on a clock of its own."""
    clock = Clock()
    return History(place, name, clock), clock


def counts() -> Counts:
    """Of 11,900,000 rows."""
    messages = [f"prompt of {length} tokens is longer than max_model_len 4096" for length in (4100, 5121, 9000)]
    messages += [EVIL, "unbroken" * 60]
    lengths = [0] * 24
    lengths[7:11] = [900_000, 5_200_000, 5_050_000, 750_000]
    outputs = [0] * 24
    outputs[0], outputs[5:11] = 1_210, [300_000, 2_200_000, 6_100_000, 2_500_000, 600_000, 198_790]
    return Counts(
        rows=11_900_000,
        samples=11_900_000,
        error_rows=1_210,
        input_tokens=3_050_000_000,
        generated_tokens=940_000_000,
        finish_reasons={"stop": 9_000_000, "length": 2_898_790, "error": 1_210},
        errors={error_kind(messages[0]): 1_200, EVIL: 9, "unbroken" * 60: 1},
        input_lengths=lengths,
        generated_lengths=outputs,
        prompt_pairs=3_050_000_000 * 300,
        decode_context=940_000_000 * 320,
        error_samples=[
            ErrorSample(error_kind(message), f"date=2026-11-{row:02}/part {EVIL}.parquet", 1_000 * row, message)
            for row, message in enumerate(messages)
        ],
    )
