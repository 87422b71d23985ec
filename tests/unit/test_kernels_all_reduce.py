"""The one-kernel sum over ranks without other ranks: its arithmetic, its buffers, its code for Hopper and its protocol.

One process holds the memory of all ranks, and the kernel does not wait. With real ranks: `tests/gpu/test_tensor_parallel_cuda.py`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from nanovllm.kernels.all_reduce import SLOTS, OneShotAllReduce, all_reduce_add_rms_norm_torch, most_programs
from nanovllm.kernels.triton_compat import HAS_TRITON

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes bfloat16 in ways of its own; float16 shows the same roundings.
DTYPES = [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]
PROGRAMS, SLOT_BYTES = 6, 1 << 16

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


def make_ranks(size: int, programs: int = PROGRAMS, slot_bytes: int = SLOT_BYTES) -> list[OneShotAllReduce]:
    count = OneShotAllReduce.memory_bytes(size, programs, slot_bytes)
    memories = [torch.zeros(count, dtype=torch.uint8, device=DEVICE) for _ in range(size)]
    addresses = [memory.data_ptr() for memory in memories]
    return [OneShotAllReduce(m, addresses, rank, programs, slot_bytes, sync=False) for rank, m in enumerate(memories)]


def randn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def buffer(rank: OneShotAllReduce, slot: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    tensor = rank.buffer(slot, *shape, dtype)
    assert tensor is not None
    return tensor


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1), (5, 37), (PROGRAMS, 256), (2 * PROGRAMS + 1, 48), (1, 1000)])
def test_sum_residual_and_norm(dtype: torch.dtype, size: int, add: bool, tokens: int, hidden: int) -> None:
    ranks = make_ranks(size)
    partials = [randn(tokens, hidden, dtype=dtype, seed=r) * 3**r for r in range(size)]
    wide = randn(tokens, 2 * hidden, dtype=dtype, seed=100) * 30
    residual, weight = wide[:, hidden:] if add else None, randn(hidden, dtype=dtype, seed=101)
    slot = (tokens + size) % SLOTS
    for rank, partial in zip(ranks, partials, strict=True):
        buffer(rank, slot, tokens, hidden, dtype=dtype).copy_(partial)
    # As many sums as ranks, and whose turn it is makes no difference to the bit.
    results = [rank.add_rms_norm(mine(rank, slot, partials[0]), residual, weight, 1e-6) for rank in ranks]
    expected, expected_total = all_reduce_add_rms_norm_torch(partials, residual, weight, 1e-6)
    for normed, total in results:
        assert total.equal(expected_total) and total.dtype == dtype
        assert normed.equal(results[0][0])
        tolerance = 2 * max(torch.finfo(dtype).eps, 2e-6)
        torch.testing.assert_close(normed, expected, rtol=tolerance, atol=tolerance)


def mine(rank: OneShotAllReduce, slot: int, like: torch.Tensor) -> torch.Tensor:
    """The buffer of `slot` as `buffer` returned it last."""
    start = rank.offsets[slot]
    return rank.memory[start : start + like.numel() * like.element_size()].view(like.dtype).view(like.shape)


def test_the_sum_is_rounded_before_the_residual_is_added() -> None:
    """2049 is no float16: with a residual of 1 the order of the roundings shows."""
    partials = [torch.tensor([[2048.0]]).half(), torch.tensor([[1.0]]).half()]
    one = torch.ones(1, 1).half()
    assert all_reduce_add_rms_norm_torch(partials, one, one[0], 1e-6)[1].item() == 2048
    total = partials[0] + partials[1]  # what an all-reduce of two ranks gives
    assert (total + one).item() == 2048


def test_buffers_of_a_rank_are_apart_aligned_and_known() -> None:
    rank = make_ranks(2, programs=70, slot_bytes=1000)[0]
    spans = []
    for slot in range(SLOTS):
        tensor = buffer(rank, slot, 5, 50)
        assert tensor.shape == (5, 50) and tensor.is_contiguous() and tensor.data_ptr() % 16 == 0
        assert rank.holds(tensor) and not rank.holds(tensor[1:])
        spans.append((tensor.data_ptr(), tensor.data_ptr() + 1000))
    flags_end = rank.memory.data_ptr() + SLOTS * rank.flags_bytes
    assert rank.flags_bytes >= 70 * 2 * 4
    assert [flags_end, *(end for _, end in spans)] <= [
        *(start for start, _ in spans),
        rank.memory.data_ptr() + rank.memory.numel(),
    ]
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
    assert spans[-1][1] <= rank.memory.data_ptr() + rank.memory.numel()
    assert not rank.holds(torch.zeros(5, 50, device=DEVICE))


def test_a_step_too_large_for_the_buffers_has_none() -> None:
    rank = make_ranks(2, slot_bytes=1000)[0]
    assert rank.buffer(0, 1, 251, torch.float32) is None
    assert rank.buffer(0, 1, 501, torch.float16) is None
    assert rank.buffer(0, 0, 8, torch.float16) is None
    assert rank.buffer(0, 1, 500, torch.float16) is not None


def test_the_same_slot_twice_in_a_row_is_refused() -> None:
    rank = make_ranks(2)[0]
    for slot in (2, 0, 1, 0, 1, 0):
        buffer(rank, slot, 1, 8)
    with pytest.raises(RuntimeError, match="slot 0"):
        rank.buffer(0, 1, 8, torch.float32)
    rank.reset()
    buffer(rank, 0, 1, 8)


def test_reset_clears_the_flags_and_nothing_else() -> None:
    rank = make_ranks(2)[0]
    rank.memory.fill_(7)
    rank.reset()
    flags = SLOTS * rank.flags_bytes
    assert not rank.memory[:flags].any() and (rank.memory[flags:] == 7).all()


def test_memory_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="100 bytes"):
        OneShotAllReduce(torch.zeros(100, dtype=torch.uint8), [0, 0], 0, PROGRAMS, SLOT_BYTES)


# --- The protocol, in all its orders -----------------------------------------------------------------------------------------


class Call(NamedTuple):
    slot: int
    programs: int


class State(NamedTuple):
    """Ranks take turns at single steps. A program is 0: not begun, 1: has signalled, 2: has waited, 3: has read."""

    call: tuple[int, ...]  # of each rank
    written: tuple[bool, ...]  # whether its product has run
    programs: tuple[tuple[int, ...], ...]
    flags: frozenset[tuple[int, int, int, int]]  # (receiver, slot, program, sender) that are 1
    buffers: tuple[tuple[int, ...], ...]  # which call wrote each rank's slot


def steps(state: State, calls: list[Call], ranks: int) -> Iterator[State]:
    """All states that one step of one rank leads to, as the kernel takes them.

    Raises:
        AssertionError: a buffer was read that does not hold this call's sums.
    """

    def put(rows: tuple, index: int, value: object) -> tuple:  # type: ignore[type-arg]
        return (*rows[:index], value, *rows[index + 1 :])

    for rank in range(ranks):
        index = state.call[rank]
        if index == len(calls):
            continue
        slot, count = calls[index]
        if not state.written[rank]:
            buffers = put(state.buffers, rank, put(state.buffers[rank], slot, index))
            yield state._replace(
                written=put(state.written, rank, True),
                buffers=buffers,
                programs=put(state.programs, rank, (0,) * count),
            )
            continue
        phases = state.programs[rank]
        if all(phase == 3 for phase in phases):
            yield state._replace(call=put(state.call, rank, index + 1), written=put(state.written, rank, False))
            continue
        peers = [peer for peer in range(ranks) if peer != rank]
        for program, phase in enumerate(phases):
            flags = state.flags
            if phase == 0:
                flags = flags | {(peer, slot, program, rank) for peer in peers}
            elif phase == 1:
                own = {(rank, slot, program, peer) for peer in peers}
                if not own <= flags:
                    continue
                flags = flags - own
            elif phase == 2:
                assert all(state.buffers[peer][slot] == index for peer in peers), (
                    f"rank {rank} read too early or too late"
                )
            else:
                continue
            yield state._replace(flags=flags, programs=put(state.programs, rank, put(phases, program, phase + 1)))


def explore(calls: list[Call], ranks: int = 2) -> int:
    """Go through every order of steps; how many states there are.

    Raises:
        AssertionError: some order reads a wrong buffer, or ends with ranks that wait for each other.
    """
    start = State((0,) * ranks, (False,) * ranks, ((),) * ranks, frozenset(), ((-1,) * SLOTS,) * ranks)
    seen, todo = {start}, [start]
    while todo:
        state = todo.pop()
        following = set(steps(state, calls, ranks))
        finished = all(call == len(calls) for call in state.call)
        assert following or (finished and not state.flags), f"nobody can go on: {state}"
        todo += following - seen
        seen |= following
    return len(seen)


def test_slots_in_turns_are_read_right_and_never_hang_in_any_order() -> None:
    """Steps of several sizes, as replays of graphs are, with and without the embedding's sum."""
    assert (
        explore([Call(2, 1), Call(0, 2), Call(1, 2), Call(0, 2), Call(1, 2), Call(0, 1), Call(1, 1), Call(0, 3)]) > 1000
    )
    assert explore([Call(slot, 1) for slot in (0, 1, 0, 1, 2, 0)], ranks=3) > 1000


@pytest.mark.parametrize("programs", [1, 2])
def test_a_slot_twice_in_a_row_goes_wrong_in_some_order(programs: int) -> None:
    with pytest.raises(AssertionError, match=r"too early or too late|nobody can go on"):
        explore([Call(0, programs), Call(1, programs), Call(1, programs), Call(0, programs)])


# --- The machine code --------------------------------------------------------------------------------------------------------

COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from nanovllm.kernels.all_reduce import MAX_REGISTERS, _all_reduce_add_rms_norm_kernel as kernel
names = [p.name for p in kernel.params]
types = dict.fromkeys(names, "i32") | {name: "*bf16" for name in names if name.endswith("_ptr")}
types |= {"addresses_ptr": "*i64", "eps": "fp32"}
constants = {"WORLD": 2, "ADD": True, "SYNC": True, "BLOCK": 4096, "PDL": True}
types |= dict.fromkeys(constants, "constexpr")
aligned = [n for n in names if n.endswith("_ptr") or n in ("size", "stride_residual", "data_offset", "flags_offset")]
source = ASTSource(
    kernel,
    types,
    constexprs={(names.index(name),): value for name, value in constants.items()},
    attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
)
options = {"num_warps": 16, "launch_pdl": True, "maxnreg": MAX_REGISTERS}
print(compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
"""


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return "\n".join(line for line in run.stdout.splitlines() if not re.match(r"\s*(\.loc|//|\$L)", line))


@needs_triton
def test_code_waits_for_the_product_signals_waits_and_only_then_reads(ptx: str) -> None:
    wait, signal, look = "griddepcontrol.wait", "@in_world st.release.sys.global.b32", "ld.acquire.sys.global.b32"
    assert [ptx.count(text) for text in (wait, signal, look)] == [1, 1, 1]
    assert ptx.index(wait) < ptx.index(signal)
    # Where the threads that have waited meet the others; the compiler lays blocks out in an order of its own.
    assert re.search(
        r"ld\.acquire\.sys\S+ flag, .*reset:\s+mov\S+ flag, 0;\s+st\.relaxed\.sys[^@]*?bar\.sync", ptx, re.DOTALL
    )
    # 16 bytes at a time, past the first-level cache, and no multicast.
    assert len(re.findall(r"ld\.global\.cg\.v4\.b32", ptx)) == 2
    assert "multimem" not in ptx


def test_programs_of_a_launch_fit_the_gpu() -> None:
    """Two programs a multiprocessor of 65,536 registers and 2,048 threads."""
    from nanovllm.kernels.all_reduce import MAX_REGISTERS, MAX_WARPS, PROGRAMS_PER_SM

    assert MAX_REGISTERS * MAX_WARPS * 32 * PROGRAMS_PER_SM <= 65536
    assert MAX_WARPS * 32 * PROGRAMS_PER_SM <= 2048
    assert most_programs(132) == 264
