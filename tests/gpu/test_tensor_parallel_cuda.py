"""Tensor parallelism on two real GPUs: the one-kernel sum against NCCL, the engine against one GPU, and its end when a rank dies."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nanovllm import LLM, AsyncLLM, EngineDeadError, SamplingParams
from nanovllm.engine import shared_prefix
from nanovllm.engine.rank_worker import join_ranks
from nanovllm.engine.ranks import RANK_ENVIRONMENT
from nanovllm.kernels.layernorm import add_rms_norm
from nanovllm.layers.parallel import PULLED_BYTES, SWITCH, TensorParallel
from tests.gpu.test_engine_cuda import PARAMS, PROMPTS, SHARED
from tests.models import make_model
from tests.unit.test_engine_tensor_parallel import PROGRAM, ROOT, gone, rank_processes, wait_until

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason=f"needs 2 CUDA devices, and {GPUS} are visible")]

IN_ONE_KERNEL = "sums over ranks in one kernel with the norm"
EPS = 1e-6


def run_rank(rank: int, rendezvous: str, results: Any) -> None:
    """All checks of the kernel in one rank: what is wrong, as lines of text."""
    try:
        for name, value in RANK_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        device = torch.device("cuda", rank)
        tp = join_ranks(rank, 2, device, rendezvous)
        problems = [] if tp.reducer is not None else [tp.summary]
        if tp.reducer is not None:
            with torch.inference_mode():
                problems = [*check_eager(tp, device), *check_graphs(tp, device), *check_limits(tp, device)]
        results.put(problems)
    except BaseException:
        results.put([traceback.format_exc()])
    results.close()
    results.join_thread()
    dist.barrier()
    os._exit(0)


def call(tp: TensorParallel, slot: int, partial: torch.Tensor, residual: Any, weight: Any) -> tuple[Any, Any]:
    buffer = tp.partial_buffer(slot, *partial.shape, partial.dtype)
    assert buffer is not None
    buffer.copy_(partial)
    return tp.all_reduce_add_norm(buffer, residual, weight, EPS)


def by_nccl(tp: TensorParallel, partial: torch.Tensor, residual: Any, weight: Any) -> tuple[Any, Any]:
    return add_rms_norm(tp.all_reduce(partial.clone()), residual, weight, EPS)


def the_same_on_all_ranks(tensor: torch.Tensor) -> bool:
    everyone = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(everyone, tensor.contiguous())
    return everyone[0].equal(everyone[1])


def check_eager(tp: TensorParallel, device: torch.device) -> list[str]:
    problems = []
    turn = 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for tokens, hidden in (
            (1, 64),
            (3, 1000),
            (16, 4096),
            (33, 37),
            (64, 2560),
            (256, 4096),
            (300, 1024),
            (20, 16384),
        ):
            for add in (True, False):
                shared = torch.Generator(device).manual_seed(turn)
                own = torch.Generator(device).manual_seed(1000 * tp.rank + turn)
                residual = torch.randn(tokens, hidden, device=device, generator=shared).to(dtype) if add else None
                weight = torch.randn(hidden, device=device, generator=shared).to(dtype)
                partial = torch.randn(tokens, hidden, device=device, generator=own).to(dtype)
                normed, total = call(tp, turn % 3, partial, residual, weight)
                expected, expected_total = by_nccl(tp, partial, residual, weight)
                name = f"{dtype}, {tokens} x {hidden}, residual {add}"
                if not total.equal(expected_total):
                    problems.append(f"{name}: sum differs in {int((total != expected_total).sum())} places")
                tolerance = 2 * max(torch.finfo(dtype).eps, 2e-6)
                if not torch.allclose(normed, expected, rtol=tolerance, atol=tolerance):
                    problems.append(f"{name}: norm differs by {(normed - expected).abs().max().item()}")
                if not (the_same_on_all_ranks(normed) and the_same_on_all_ranks(total)):
                    problems.append(f"{name}: ranks differ")
                turn += 1
    return problems


def check_graphs(tp: TensorParallel, device: torch.device, replays: int = 1000, layers: int = 4) -> list[str]:
    """Graphs of several sizes and eager steps in random order, fresh numbers each, ranks now and then held up."""
    hidden, dtype = 1024, torch.bfloat16
    weight = torch.randn(hidden, device=device, generator=torch.Generator(device).manual_seed(7)).to(dtype)
    sizes = (1, 8, 40, 300)
    partials = torch.zeros(layers, max(sizes), hidden, dtype=dtype, device=device)

    def step(tokens: int, function: Any) -> torch.Tensor:
        """A chain of layers as a model has it: the sum is the next residual; all norms and the last sum."""
        outputs, residual = [], None
        for layer in range(layers):
            normed, residual = function(layer % 2, partials[layer, :tokens], residual, weight)
            outputs.append(normed)
        return torch.stack([*outputs, residual])

    def fused(slot: int, *arguments: Any) -> tuple[Any, Any]:
        return call(tp, slot, *arguments)

    def nccl(_: int, *arguments: Any) -> tuple[Any, Any]:
        return by_nccl(tp, *arguments)

    graphs = {}
    for tokens in sizes:
        step(tokens, fused)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = step(tokens, fused)
        graphs[tokens] = graph, output
    order, own_pace = random.Random(0), random.Random(tp.rank)
    own = torch.Generator(device).manual_seed(tp.rank)
    wrong = torch.zeros(2, dtype=torch.int64, device=device)
    for replay in range(replays):
        tokens = order.choice(sizes)
        partials.normal_(generator=own)
        if order.random() < 0.1:
            output = step(tokens, fused)
        else:
            graph, output = graphs[tokens]
            graph.replay()
        if own_pace.random() < 0.05:
            time.sleep(0.002)
        # Sums and roundings are those of NCCL; a norm's own sum may be taken in another order.
        expected = step(tokens, nccl)
        wrong[0] += (output[-1] != expected[-1]).sum()
        wrong[1] += ((output - expected).abs() > 0.02 + 0.02 * expected.abs()).sum()
        if replay % 100 == 0 and not the_same_on_all_ranks(output):
            return [f"replay {replay} of {tokens} tokens: ranks differ"]
    if not wrong.any():
        return []
    return [f"graphs: {wrong.tolist()} sums and norms of {replays} replays are wrong"]


def check_limits(tp: TensorParallel, device: torch.device) -> list[str]:
    """Steps too large for the buffers go through NCCL, and small ones between them do not mind."""
    problems = []
    weight = torch.ones(4096, dtype=torch.bfloat16, device=device)
    most = PULLED_BYTES // weight.nbytes  # of two ranks
    for slot, tokens in ((0, most), (1, most + 1), (1, most), (0, 5)):
        buffer = tp.partial_buffer(slot, tokens, 4096, torch.bfloat16)
        if (buffer is None) != (tokens > most):
            problems.append(f"{tokens} tokens: buffer is {'None' if buffer is None else 'there'}")
            continue
        x = torch.empty(tokens, 4096, dtype=torch.bfloat16, device=device) if buffer is None else buffer
        x.fill_(tp.rank + 1)
        _, total = tp.all_reduce_add_norm(x, torch.full_like(x, 4), weight, EPS)
        if not bool((total == 7).all()):
            problems.append(f"{tokens} tokens: wrong sum")
    return problems


def test_the_kernel_gives_what_nccl_and_the_norm_give(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = [(rank, str(tmp_path / "store"), results) for rank in range(2)]
    processes = [context.Process(target=run_rank, args=these, daemon=True) for these in arguments]
    for process in processes:
        process.start()
    try:
        for _ in processes:
            assert results.get(timeout=200) == []
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "model")


def generate(model: Path, prompts: list[list[int]] = PROMPTS, **options: Any) -> tuple[list[list[int]], str]:
    """Greedy tokens, and sampled ones, and what the engine says it runs on."""
    defaults = {"dtype": "float32", "max_model_len": 256, "kvcache_block_size": 16, "max_num_seqs": 24}
    llm = LLM(str(model), **(defaults | {"gpu_memory_utilization": 0.3} | options))
    greedy = SamplingParams(temperature=0, max_tokens=40)
    outputs = [*llm.generate(prompts, greedy, use_tqdm=False), *llm.generate(prompts, PARAMS, use_tqdm=False)]
    summary = llm.executor.summary
    llm.exit()
    return [output["token_ids"] for output in outputs], summary


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    return generate(model)[0]


@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}, {"max_num_batched_tokens": 64}], ids=str)
def test_two_gpus_give_the_tokens_of_one(model: Path, expected: list[list[int]], options: dict[str, Any]) -> None:
    tokens, summary = generate(model, tensor_parallel_size=2, **options)
    assert summary.endswith(IN_ONE_KERNEL)
    assert tokens == expected


def test_ranks_attend_once_to_what_is_shared(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What decodes share is found in the engine and travels to the ranks."""
    for name, value in (("LEAST_TOKENS", 16), ("LEAST_SAVED", 1), ("LEAST_SAVED_BYTES", 1), ("ENTRY_TOKENS", 0)):
        monkeypatch.setattr(shared_prefix, name, value)
    prompts = [SHARED + prompt[:40] for prompt in PROMPTS]
    plain, _ = generate(model, prompts, shared_prefix_attention=False)
    tokens, summary = generate(model, prompts, tensor_parallel_size=2)
    assert "shared prefixes once" in summary
    assert tokens == plain


def test_nccl_gives_them_too(model: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    tokens, summary = generate(model, tensor_parallel_size=2)
    assert summary.endswith(f"sums over ranks through NCCL (rank 0: {SWITCH}=0)")
    assert tokens == expected


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_every_request_within_seconds(victim: int, model: Path) -> None:
    """The other one's GPU waits for it meanwhile, in our kernel or in NCCL's."""
    engine = AsyncLLM(str(model), tensor_parallel_size=2, kvcache_block_size=16, gpu_memory_utilization=0.3)
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
    engine.shutdown()


def test_ranks_end_when_their_parent_is_killed(model: Path, tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = dict(os.environ, PYTHONPATH=path, TMPDIR=str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(model)], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
        ranks = rank_processes(parent.pid)
        assert len(ranks) == 2
        time.sleep(0.3)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        wait_until(lambda: all(map(gone, ranks)))


APART = """
import json, os, sys
from pathlib import Path
from tests.gpu.test_tensor_parallel_cuda import generate
from tests.unit.test_ranks import Elsewhere
launcher = Elsewhere(before=lambda address, port: os.environ.update(CUDA_VISIBLE_DEVICES="1"))
print(json.dumps(generate(Path(sys.argv[1]), tensor_parallel_size=2, launcher=launcher)))
"""


def test_ranks_that_see_only_their_own_gpu(model: Path, expected: list[list[int]]) -> None:
    """As on several nodes: each rank is given one GPU, they meet over TCP and sum through NCCL."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path]), CUDA_VISIBLE_DEVICES="0")
    command = [sys.executable, "-c", APART, str(model)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=280, check=True)
    tokens, summary = json.loads(done.stdout.splitlines()[-1])
    assert summary.endswith("sums over ranks through NCCL (rank 0: the ranks see no GPUs but their own)")
    assert tokens == expected
