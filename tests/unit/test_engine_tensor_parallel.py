"""Tensor parallel over real child processes: what happens to them when something ends, and that nobody waits forever.

That two ranks give the tokens of one is in `test_models_hf.py`.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from nanovllm import LLM, AsyncLLM, EngineDeadError, SamplingParams
from nanovllm.engine.executor import MultiprocExecutor, RankReply

ROOT = Path(__file__).resolve().parents[2]


def rank_processes(parent: int | None = None) -> list[psutil.Process]:
    """The rank processes this process (or `parent`) started, rank 0 first."""
    children = psutil.Process(parent).children()
    found = [child for child in children if "nanovllm.engine.rank_worker" in child.cmdline()]
    return sorted(found, key=lambda child: child.pid)


def wait_until(condition: Callable[[], bool], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_every_request_with_its_name(victim: int, model_dir: Path) -> None:
    engine = AsyncLLM(str(model_dir), tensor_parallel_size=2, kvcache_block_size=16)
    ranks = rank_processes()
    assert len(ranks) == 2
    futures = [engine.submit([i], SamplingParams(temperature=0, max_tokens=500)) for i in range(8)]
    wait_until(lambda: engine.stats().generated_tokens > 20)
    ranks[victim].kill()
    killed_at = time.monotonic()
    for future in futures:
        with pytest.raises(EngineDeadError, match=rf"rank {victim} \(pid {ranks[victim].pid}\) was killed by SIGKILL"):
            future.result(timeout=10)
    assert time.monotonic() - killed_at < 10
    wait_until(lambda: all(map(gone, ranks)))
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        engine.submit([1], SamplingParams()).result(timeout=5)
    engine.shutdown()


def test_two_ranks_sample_as_one_and_end_with_their_engine(model_dir: Path) -> None:
    rng = random.Random(0)
    prompts = [[rng.randrange(257) for _ in range(rng.randint(1, 30))] for _ in range(8)]
    params = [SamplingParams(temperature=0.9, max_tokens=16, seed=i) for i in range(8)]
    # So hot that every token is as likely: one of the row that pads 257 tokens to two equal halves would show.
    prompts += [[1]] * 64
    params += [SamplingParams(temperature=1e6, max_tokens=16, seed=i) for i in range(64)]
    one = LLM(str(model_dir), kvcache_block_size=16).generate(prompts, params, use_tqdm=False)
    llm = LLM(str(model_dir), tensor_parallel_size=2, kvcache_block_size=16)
    ranks = rank_processes()
    two = llm.generate(prompts, params, use_tqdm=False)
    assert [o["token_ids"] for o in two] == [o["token_ids"] for o in one]
    rendezvous = llm.executor.rendezvous_dir  # type: ignore[attr-defined]
    assert rendezvous.is_dir()
    llm.exit()
    assert all(map(gone, ranks))
    assert not rendezvous.exists()
    with pytest.raises(EngineDeadError, match="shut down"):
        llm.generate(prompts, params, use_tqdm=False)
    llm.exit()  # a second time does no harm


def test_ranks_end_when_the_engine_is_dropped(model_dir: Path) -> None:
    llm = LLM(str(model_dir), tensor_parallel_size=2, kvcache_block_size=16)
    ranks = rank_processes()
    assert len(ranks) == 2
    rendezvous = llm.executor.rendezvous_dir  # type: ignore[attr-defined]
    del llm
    gc.collect()
    wait_until(lambda: all(map(gone, ranks)))
    assert not rendezvous.exists()


def test_the_killed_rank_is_blamed_even_if_another_complains_first() -> None:
    """The survivors' collectives fail with it, and their words may arrive before its end is seen."""
    executor = object.__new__(MultiprocExecutor)
    executor.rendezvous_dir = Path("/nonexistent")
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    executor.processes = [subprocess.Popen(sleep) for _ in range(2)]
    pairs = [multiprocessing.Pipe() for _ in range(2)]
    executor.connections = [ours for ours, _ in pairs]
    processes = list(executor.processes)
    pairs[0][1].send(RankReply(error="RuntimeError: Connection closed by peer"))
    processes[1].kill()
    with pytest.raises(EngineDeadError, match=r"rank 1 .* was killed by SIGKILL"):
        executor._receive_all()
    assert all(process.poll() is not None for process in processes)


PROGRAM = """
import sys
from nanovllm import LLM, SamplingParams
llm = LLM(sys.argv[1], tensor_parallel_size=2, kvcache_block_size=16)
print("ready", flush=True)
while True:
    llm.generate([[1, 2, 3]] * 4, SamplingParams(max_tokens=100), use_tqdm=False)
"""


def test_ranks_end_when_their_parent_is_killed(model_dir: Path, tmp_path: Path) -> None:
    environment = dict(os.environ, PYTHONPATH=str(ROOT), TMPDIR=str(tmp_path))
    command = [sys.executable, "-c", PROGRAM, str(model_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        ranks = rank_processes(parent.pid)
        assert len(ranks) == 2
        time.sleep(0.1)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        wait_until(lambda: all(map(gone, ranks)))
    assert not list(tmp_path.glob("nanovllm-*"))
