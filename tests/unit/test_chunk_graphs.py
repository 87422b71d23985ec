"""Steps with chunks as CUDA graphs run them: padded, packed into one array, from memory that stays. Graphs need a GPU; here one that is
"replayed" runs its step again on whatever that memory holds, so all but CUDA's own part is what runs there."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm import LLM, RequestOutput, SamplingParams
from nanovllm.engine import cuda_graph, scheduler, shared_prefix, step_result
from nanovllm.engine.chunk_input import ChunkInput, ChunkShape
from nanovllm.engine.cuda_graph import ChunkGraphs
from nanovllm.kernels import triton_compat
from nanovllm.kernels.triton_compat import HAS_TRITON
from nanovllm.utils.transfer import HostCopy
from tests.preemption import NoReserve

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has the real ones"),
]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time for each."""
    monkeypatch.setattr(triton_compat, "DEFAULT_SMS", 4)


class Replay:
    """Stands in for a captured graph."""

    def __init__(self, run: Callable[[], tuple[torch.Tensor, ...]], outputs: tuple[torch.Tensor, ...]) -> None:
        self.run, self.outputs, self.count = run, outputs, 0

    def replay(self) -> None:
        for kept, fresh in zip(self.outputs, self.run(), strict=True):
            kept.copy_(fresh)
        self.count += 1


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs without CUDA."""

    def capture(
        run: Callable[[], tuple[torch.Tensor, ...]], *_: Any, loaded: bool = False
    ) -> tuple[Replay, tuple[torch.Tensor, ...]]:
        outputs = tuple(tensor.clone() for tensor in run())
        return Replay(run, outputs), outputs

    monkeypatch.setattr(cuda_graph, "capture", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    # On a GPU the copy is made before the next replay writes to the same memory.
    monkeypatch.setattr(step_result, "HostCopy", lambda tensor: HostCopy(tensor.clone()))


def use_graphs(llm: LLM, monkeypatch: pytest.MonkeyPatch, tokens: tuple[int, ...]) -> ChunkGraphs:
    """Give a CPU engine graphs of steps with chunks."""
    emulate(monkeypatch)
    monkeypatch.setattr(cuda_graph, "CHUNK_TOKENS", tokens)
    runner = llm.executor.runner  # type: ignore[attr-defined]
    runner.graphs[False, False] = runner._make_graphs((0, 0))
    graphs: ChunkGraphs = runner.graphs[False, False].chunks
    return graphs


RNG = random.Random(3)
SHARED = [RNG.randrange(257) for _ in range(18)]
# Triton's interpreter takes a second a step.
PROMPTS = [SHARED * (i % 3 == 0) + [RNG.randrange(257) for _ in range(RNG.randint(1, 20))] for i in range(6)]
# Some are scored, in steps with others' decodes before them.
PARAMS = [
    SamplingParams(
        temperature=0.9 * (i % 2),
        max_tokens=RNG.randint(1, 5),
        seed=i,
        top_k=5 * (i % 4 == 3),
        prompt_logprobs=1 if i in (3, 4) else None,
    )
    for i in range(len(PROMPTS))
]


def scores(output: RequestOutput) -> list[float]:
    """Log-probabilities of a prompt's tokens, where they were asked for."""
    positions = output.get("prompt_logprobs") or [None]
    return [entry.logprob for position in positions[1:] for entry in (position or {}).values()]


@pytest.mark.parametrize(
    ("tokens", "capture_at", "options"),
    [
        ((16, 64), 1, {}),
        ((8,), 1, {"max_num_batched_tokens": 16}),
        pytest.param((16, 512), 2, {"max_num_batched_tokens": 16}, marks=pytest.mark.long),
        pytest.param((64,), 1, {"async_scheduling": False}, marks=pytest.mark.long),
    ],
    ids=["small", "large", "in chunks", "one step at a time"],
)
def test_padded_steps_give_the_same_tokens(
    tokens: tuple[int, ...], capture_at: int, options: dict[str, Any], model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that come and go: nearly every step has decodes and the chunk of a new prompt, one size or another."""
    monkeypatch.setattr(cuda_graph, "CHUNK_CAPTURE_AT", capture_at)
    monkeypatch.setattr(cuda_graph, "CHUNK_DECODE_SIZES", 1)  # decodes are padded too
    common = {"kvcache_block_size": 16, "max_num_seqs": 3, "max_model_len": 64, **options}
    found, scored = [], []
    for graphs_too in (False, True):
        llm = LLM(str(model_dir), attention_backend="triton", **common)
        graphs = use_graphs(llm, monkeypatch, tokens) if graphs_too else None
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert [output["error"] for output in outputs] == [None] * len(outputs)
        found.append([output["token_ids"] for output in outputs])
        scored.append([scores(output) for output in outputs])
        if graphs is not None:
            replays = {shape: graph.count for shape, (graph, _) in graphs.graphs.items()}  # type: ignore[attr-defined]
            assert sum(replays.values()) >= 3, replays
            if tokens == (8,):  # large ones, without decodes and with
                large = [shape.decodes for shape in replays if shape.tokens > 8]
                assert large and max(large) > 0 == min(large), replays
            assert all(
                count < cuda_graph.CHUNK_CAPTURE_AT for shape, count in graphs.wanted.items() if shape not in replays
            )
        llm.exit()
    assert found[0] == found[1]
    assert sum(map(bool, scored[0])) == 2
    for plain, padded in zip(*scored, strict=True):
        assert padded == pytest.approx(plain, abs=1e-4)


def test_masked_sampling_as_graphs_gives_the_same_tokens(chat_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Constrained rows that come and go beside free ones; the graphs are captured in the middle of it."""
    params = [
        SamplingParams(
            0.9 * (row % 2),
            row % 5 + 12,
            seed=row,
            structured_outputs={"regex": f"[a-f]{{{row % 7 + 1}}}-[0-9]+"} if row % 3 else None,
        )
        for row in range(12)
    ]
    found = []
    for graphs_too in (False, True):
        llm = LLM(str(chat_model_dir), kvcache_block_size=16, max_num_seqs=5)
        runner = llm.executor.runner  # type: ignore[attr-defined]
        if graphs_too:
            emulate(monkeypatch)
            monkeypatch.setattr(cuda_graph, "graph_sizes", lambda most: [2, most])
            runner.masked_sampling = runner._make_masked_sampling((0, 0))
        outputs = llm.generate([f"fox {row}" for row in range(12)], params, use_tqdm=False)
        assert [output["error"] for output in outputs] == [None] * len(outputs)
        found.append([output["token_ids"] for output in outputs])
        if graphs_too:
            graphs = runner.masked_sampling.graphs.graphs
            assert sum(graph.count for graph, _ in graphs.values()) > 20 and len(graphs) == 2
            assert runner.state.positions[runner.state.padding_slot] == -1
        llm.exit()
    assert found[0] == found[1]


@pytest.mark.parametrize("graphs_too", [pytest.param(False, marks=pytest.mark.long), True], ids=["eager", "graphs"])
def test_shared_prefixes_give_the_same_tokens(
    graphs_too: bool, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with one instruction, two documents and something of their own, that come and go; preempted ones among them."""
    for name, value in (("LEAST_TOKENS", 16), ("LEAST_SAVED", 1), ("LEAST_SAVED_BYTES", 1), ("ENTRY_TOKENS", 0)):
        monkeypatch.setattr(shared_prefix, name, value)
    monkeypatch.setattr(cuda_graph, "CAPTURE_AT", 2)
    monkeypatch.setattr(scheduler, "Demand", NoReserve)
    documents = [[RNG.randrange(257) for _ in range(18)] for _ in range(2)]
    prompts = [SHARED + documents[row % 2] + [row] * (1 + row % 3) for row in range(5)] + [[5] * 3]
    params = [SamplingParams(temperature=0.9 * (row % 2), max_tokens=2 + row % 3, seed=row) for row in range(6)]
    found = []
    for shared in (False, True):
        llm = LLM(
            str(model_dir),
            attention_backend="triton",
            shared_prefix_attention=shared,
            kvcache_block_size=16,
            max_num_seqs=4,
            max_model_len=64,
            num_kvcache_blocks=10,
        )
        if graphs_too and shared:
            use_graphs(llm, monkeypatch, (16, 64))
        levels = 0
        if llm.sharing is not None:
            update = llm.sharing.update

            def watched(*arguments: Any, update: Any = update) -> Any:
                nonlocal levels
                shares, what = update(*arguments)
                levels = max(levels, 0 if what is None else int(what.rows[3].max()))
                return shares, what

            monkeypatch.setattr(llm.sharing, "update", watched)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert [output["error"] for output in outputs] == [None] * len(outputs)
        found.append([output["token_ids"] for output in outputs])
        assert levels == 2 * shared, "an instruction, and a document after it"
        if graphs_too and shared:
            graphs_of = llm.executor.runner.graphs  # type: ignore[attr-defined]
            assert len(graphs_of[False, True].whole.graphs) == 1, "one size, which came up twice"
            assert graphs_of[False, False].whole.graphs, "what a step is replayed with before"
        llm.exit()
    assert found[0] == found[1]


def test_sizes(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(model_dir), attention_backend="triton", max_num_seqs=250, max_num_batched_tokens=700)
    graphs = use_graphs(llm, monkeypatch, (32, 64, 1024))
    assert graphs.tokens == [32, 64, 700], "the last one is as large as a step can be"
    for decodes, tokens in ((0, 1), (1, 32), (64, 33), (250, 64), (249, 65), (3, 700)):
        padded = graphs.padded(ChunkShape(decodes, tokens, tiles=2, samples=decodes + 1))
        assert padded is not None
        assert decodes <= padded.decodes <= min(250, decodes + 32)
        assert padded.tokens == next(size for size in graphs.tokens if size >= tokens)
        assert padded.size <= len(graphs.array)
    assert graphs.padded(ChunkShape(1, 701, 2, 2)) is None
    assert graphs.padded(ChunkShape(1, 20, 2, 400)) is None, "more prompts end in it than the graph has rows for"


def test_the_least_used_graph_goes(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(model_dir), attention_backend="triton", kvcache_block_size=16, max_num_seqs=2, max_model_len=64)
    graphs = use_graphs(llm, monkeypatch, (8, 16, 32))
    monkeypatch.setattr(cuda_graph, "MAX_CHUNK_GRAPHS", 2)
    monkeypatch.setattr(cuda_graph, "CHUNK_CAPTURE_AT", 1)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: type("S", (), {"synchronize": lambda self: None})()
    )
    kept = []
    for length in (8, 16, 8, 32, 8):
        llm.generate([list(np.arange(length) + length)], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        kept.append([shape.tokens for shape in graphs.graphs])
    assert kept == [[8], [8, 16], [16, 8], [8, 32], [32, 8]]


def test_parts_of_the_array() -> None:
    shape = ChunkShape(2, 3, 1, 4)
    inputs = ChunkInput.of(torch.arange(shape.size), shape)
    assert [tensor.numel() for tensor in inputs] == [2, 3, 3, 3, 4, 4, 4, 4]
    assert torch.cat([tensor.flatten().long() for tensor in inputs]).tolist() == list(range(shape.size))


@pytest.mark.parametrize(
    ("most_seqs", "budget"), [(256, 16384), (1024, 16384), (4096, 8192), (100, 2000), (7, 5000), (3, 16), (1, 8)]
)
@pytest.mark.parametrize("large", [False, True])
def test_a_graphs_size_holds_the_step(
    most_seqs: int, budget: int, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its array, and the rows that memory was left for, hold the graph; a large step has one where they were asked for."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    device, rng = torch.device("cpu"), random.Random(most_seqs)
    graphs = ChunkGraphs(
        lambda _: (),
        lambda tokens, chunks: tokens // 32 + chunks,
        most_seqs,
        budget,
        most_seqs,
        device,
        (0, 0),
        large,
    )
    rows = cuda_graph.most_rows(most_seqs, budget, large=large)
    without = set()
    for _ in range(3000):
        decodes = rng.randrange(min(most_seqs, budget))
        most = budget - decodes
        tokens = rng.choice([rng.randint(1, most), most, rng.randint(1, min(most, 2048))])
        chunks = rng.randint(1, min(tokens, most_seqs - decodes))
        samples, tiles = decodes + rng.randint(0, chunks), rng.randint(chunks, tokens // 32 + chunks)
        padded = graphs.padded(ChunkShape(decodes, tokens, tiles, samples))
        if padded is None:
            without.add(tokens)
            continue
        assert all(size >= wanted for size, wanted in zip(padded, (decodes, tokens, tiles, samples), strict=True))
        assert padded.size <= len(graphs.array) and padded.decodes + padded.tokens <= rows
        if tokens > 2048:
            assert padded.tokens <= 1.25 * tokens, "padding costs little"
    assert not without if large else all(tokens > 2048 for tokens in without)
