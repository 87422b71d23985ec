"""Tensor parallel over real child processes: what happens to them when something ends, and that nobody waits forever.

That two ranks give the tokens of one is in `test_models_hf.py`; on GPUs in `tests/gpu/test_tensor_parallel_cuda.py`.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from nanovllm import LLM, AsyncLLM, EngineDeadError, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.engine.executor import RankedExecutor, RankReply
from nanovllm.engine.model_input import ModelInput
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.rank_worker import join_ranks
from nanovllm.engine.ranks import RANK_ENVIRONMENT, ChildRank, RankGroup
from nanovllm.kernels.all_reduce import OneShotAllReduce
from nanovllm.kernels.layernorm import add_rms_norm_torch
from nanovllm.kernels.triton_compat import HAS_TRITON
from nanovllm.layers import parallel
from nanovllm.layers.parallel import SWITCH, TensorParallel
from nanovllm.preflight import check_model
from tests.models import make_model

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
        with pytest.raises(
            EngineDeadError, match=rf"rank {victim} \(pid {ranks[victim].pid}\) was killed by SIGKILL"
        ) as died:
            future.result(timeout=10)
        assert died.value.killed  # from outside: no request is to blame
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
    rendezvous = Path(llm.executor.group.rendezvous).parent  # type: ignore[attr-defined]
    assert rendezvous.is_dir()
    llm.exit()
    assert all(map(gone, ranks))
    assert not rendezvous.exists()
    with pytest.raises(EngineDeadError, match="shut down"):
        llm.generate(prompts, params, use_tqdm=False)
    llm.exit()  # a second time does no harm


def test_ranks_end_when_the_engine_is_dropped(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANK_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    llm = LLM(str(model_dir), tensor_parallel_size=2, kvcache_block_size=16)
    ranks = rank_processes()
    assert len(ranks) == 2
    for rank in ranks:  # what the user has set stays
        assert {**RANK_ENVIRONMENT, "NCCL_NVLS_ENABLE": "1"}.items() <= rank.environ().items()
    assert llm.executor.summary.endswith("sums over ranks through gloo")
    rendezvous = Path(llm.executor.group.rendezvous).parent  # type: ignore[attr-defined]
    del llm
    gc.collect()
    wait_until(lambda: all(map(gone, ranks)))
    assert not rendezvous.exists()


def test_the_killed_rank_is_blamed_even_if_another_complains_first() -> None:
    """The survivors' collectives fail with it, and their words may arrive before its end is seen."""
    executor = object.__new__(RankedExecutor)
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    processes = [subprocess.Popen(sleep) for _ in range(2)]
    pairs = [multiprocessing.Pipe() for _ in range(2)]
    ranks = [ChildRank(process, ours) for process, (ours, _) in zip(processes, pairs, strict=True)]
    executor.group = RankGroup([*ranks], "/nonexistent/store")
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


def test_a_rank_that_is_stuck_ends_with_its_engine_too(tmp_path: Path) -> None:
    """Its main thread may wait for a GPU that waits for a rank that is gone. Messages not yet read do not hide the end."""
    program = """
import sys, threading, time
from nanovllm.engine.rank_worker import leave_with_engine
threading.Thread(target=leave_with_engine, args=(int(sys.argv[1]), sys.argv[2]), daemon=True).start()
print("ready", flush=True)
time.sleep(600)
"""
    ours, theirs = socket.socketpair()
    rendezvous = tmp_path / "ranks" / "store"
    rendezvous.parent.mkdir()
    command = [sys.executable, "-c", program, str(theirs.fileno()), str(rendezvous)]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    with subprocess.Popen(
        command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            theirs.close()
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            ours.send(b"a step")
            time.sleep(0.2)
            assert process.poll() is None
            ours.close()
            assert process.wait(timeout=5) == 0
        finally:
            process.kill()
    assert not rendezvous.parent.exists()


def values(rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Partial sums of one rank, and the residual and weight that all ranks have."""
    shared = torch.Generator().manual_seed(seed)
    residual, weight = torch.randn(7, 48, generator=shared), torch.randn(48, generator=shared)
    return torch.randn(7, 48, generator=torch.Generator().manual_seed(100 * seed + rank)), residual, weight


def run_rank(function: Callable[[TensorParallel, Any], None], rank: int, rendezvous: str, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK_ENVIRONMENT)
    try:
        function(join_ranks(rank, 2, torch.device("cpu"), rendezvous), results)
    except BaseException:
        results.put(traceback.format_exc())  # in the place of what is waited for
    torch.distributed.destroy_process_group()


def sum_on_two_ranks(tp: TensorParallel, results: Any) -> None:
    for seed in range(3):
        mine, residual, weight = values(tp.rank, seed)
        assert tp.partial_buffer(seed, 7, 48, torch.float32) is None
        normed, total = tp.all_reduce_add_norm(mine, residual if seed else None, weight, 1e-6)
        results.put((tp.rank, seed, normed.tolist(), total.tolist()))


def choose_on_two_ranks(tp: TensorParallel, results: Any) -> None:
    """Ranks that could use symmetric memory but for what goes wrong on one of them."""
    torch.cuda.can_device_access_peer = lambda device, peer: True

    def choose(stage: str, culprit: int) -> None:
        def fail(*_: Any) -> None:
            raise RuntimeError(f"{stage} says no\nand goes on")

        before = getattr(parallel, stage)
        setattr(parallel, stage, fail if tp.rank == culprit else lambda *_: None)
        results.put((tp.rank, stage, *parallel._open_one_shot(tp.rank, 2, tp.group, torch.device("cpu"))))
        setattr(parallel, stage, before)

    choose("_rendezvous", 1)
    choose("_check_fit", 0)
    os.environ[SWITCH] = str(int(tp.rank == 0))
    results.put((tp.rank, "switch", *parallel._open_one_shot(tp.rank, 2, tp.group, torch.device("cpu"))))


def run_two_ranks(function: Callable[[TensorParallel, Any], None], tmp_path: Path, count: int) -> list[Any]:
    """`function` in two processes of one group, and the `count` results they put into the queue."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = [(function, rank, str(tmp_path / "store"), results) for rank in range(2)]
    processes = [context.Process(target=run_rank, args=these, daemon=True) for these in arguments]
    for process in processes:
        process.start()
    found: list[Any] = []
    try:
        while len(found) < count:
            found.append(results.get(timeout=60))
            assert not isinstance(found[-1], str), found[-1]
        for process in processes:
            process.join(timeout=20)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
    return found


def test_partial_sums_without_symmetric_memory(tmp_path: Path) -> None:
    for _, seed, normed, total in run_two_ranks(sum_on_two_ranks, tmp_path, 6):
        (x, residual, weight), (y, _, _) = values(0, seed), values(1, seed)
        expected, expected_total = add_rms_norm_torch(x + y, residual if seed else None, weight, 1e-6)
        assert torch.tensor(total).equal(expected_total)
        torch.testing.assert_close(torch.tensor(normed), expected)


def test_all_ranks_choose_the_same_way_to_sum(tmp_path: Path) -> None:
    found = {(rank, stage): rest for rank, stage, *rest in run_two_ranks(choose_on_two_ranks, tmp_path, 6)}
    for rank in range(2):
        assert found[rank, "_rendezvous"] == [None, "rank 1: _rendezvous says no"]
        assert found[rank, "_check_fit"] == [None, "rank 0: _check_fit says no"]
        assert found[rank, "switch"] == [None, f"rank 1: {SWITCH}=0"]


def test_one_rank_sums_nothing() -> None:
    x, residual, weight = values(0, 1)
    expected = add_rms_norm_torch(x, residual, weight, 1e-6)
    tp = TensorParallel()
    assert tp.partial_buffer(0, 7, 48, torch.float32) is None
    for actual, wanted in zip(tp.all_reduce_add_norm(x, residual, weight, 1e-6), expected, strict=True):
        assert actual.equal(wanted)


class FilesAllReduce(OneShotAllReduce):
    """Ranks whose common memory is files, and who meet before they read each other's instead of in the kernel."""

    calls = 0

    def add_rms_norm(self, *arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        torch.distributed.barrier()
        return super().add_rms_norm(*arguments, **options)


def run_steps(tp: TensorParallel, model_dir: Path) -> list[int]:
    """Tokens of a prefill of 9 tokens and 5 decode steps of one sequence."""
    config = EngineConfig.create(str(model_dir), tensor_parallel_size=2, device="cpu", kvcache_block_size=16)
    runner = ModelRunner(config, check_model(config), 16, tp)
    runner.start(1)
    nothing = np.zeros(0, dtype=np.int64)
    prefill = ModelInput(
        num_decodes=0,
        slots=np.array([0]),
        query_lens=[9],
        context_lens=[9],
        token_ids=np.arange(50, 59),
        sample_rows=np.array([0]),
        new_blocks=np.zeros((3, 0), dtype=np.int64),
        new_sequences=np.array([[0], [0], [0], [0], [7]]),
        new_temperatures=np.array([0.8], dtype=np.float32),
    )
    decode = prefill._replace(
        num_decodes=1,
        query_lens=[1],
        token_ids=nothing,
        new_sequences=np.zeros((5, 0), dtype=np.int64),
        new_temperatures=np.zeros(0, dtype=np.float32),
    )
    steps = [prefill, *(decode._replace(context_lens=[length]) for length in range(10, 15))]
    return [token for step in steps for token in runner.launch(step).result().tokens]


def decode_with_the_kernel(model_dir: Path, tp: TensorParallel, results: Any) -> None:
    """The model's sums by gloo, and by the kernel with room for all steps, and for the decode steps only."""
    from tests import conftest  # noqa: F401  (mends the interpreter)

    expected = run_steps(tp, model_dir)
    for tokens in (16, 1):
        slot_bytes = tokens * 48 * 4
        count = OneShotAllReduce.memory_bytes(2, 4, slot_bytes)
        paths = [str(model_dir / f"memory-{tokens}-{rank}") for rank in range(2)]
        memories = [torch.from_file(path, shared=True, size=count, dtype=torch.uint8) for path in paths]
        addresses = [memory.data_ptr() for memory in memories]
        reducer = FilesAllReduce(memories[tp.rank], addresses, tp.rank, 4, slot_bytes, sync=False)
        actual = run_steps(replace(tp, reducer=reducer), model_dir)
        results.put((actual == expected, len(set(actual)) > 1, reducer.calls))


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_a_model_sums_through_common_memory(tmp_path: Path) -> None:
    """Two layers have four sums a step, which take the two slots in turns or the kernel's buffers refuse."""
    model_dir = make_model(tmp_path / "model")
    found = run_two_ranks(partial(decode_with_the_kernel, model_dir), tmp_path, 4)
    assert sorted(found) == [(True, True, 20), (True, True, 20), (True, True, 24), (True, True, 24)]
