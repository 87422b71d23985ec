"""The tensor-parallel view of one rank: every sharded layer takes it as an argument, so several engines can live in one process.

Ranks add up their partial sums in one of two ways, chosen once for all of them when they join (`TensorParallel.join`): on GPUs
that reach each other's memory by `kernels.all_reduce`, as long as a step is small enough; else by NCCL, or gloo on CPUs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nanovllm.kernels.all_reduce import SLOTS, OneShotAllReduce, all_reduce_add_rms_norm_torch, most_programs
from nanovllm.kernels.layernorm import add_rms_norm, add_rms_norm_torch
from nanovllm.kernels.triton_compat import HAS_TRITON, use_triton

# Bytes a rank reads from all others in one call at most. One-shot reads grow with the ranks, NCCL's ring does not: for two
# ranks this won up to the largest size measured (bench/NOTES.md). It also bounds the memory: 96 MiB for two ranks, then less.
PULLED_BYTES = 32 << 20
# "0" leaves all sums to NCCL: to measure, or to get by where GPUs reach each other in theory only.
SWITCH = "NANOVLLM_SYMMETRIC_MEMORY"
# Looks at a flag, of half a microsecond or more each, after which the trial of a new group is given up.
TRIAL_SPINS = 1 << 24


@dataclass(frozen=True)
class TensorParallel:
    """Rank `rank` of `size` ranks that share one model. With `size` 1 no process group is needed and nothing is sent.

    Attributes:
        reducer: the one-kernel sum, where this group has it; summary: how the ranks' sums are taken, for people.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    reducer: OneShotAllReduce | None = None
    summary: str = ""

    @classmethod
    def join(cls, rank: int, size: int, group: dist.ProcessGroup | None, device: torch.device) -> TensorParallel:
        """The view of one rank whose process group exists; every rank calls this, and all choose the same way.

        Args:
            device: this rank's; on GPUs it is the current one. The one-kernel sum needs rank r to have GPU r of those it sees.
        """
        if device.type != "cuda":
            return cls(rank, size, group, None, "sums over ranks through gloo")
        reducer, problem = _open_one_shot(rank, size, group, device)
        if problem is None:
            return cls(rank, size, group, reducer, "sums over ranks in one kernel with the norm")
        return cls(rank, size, group, None, f"sums over ranks through NCCL ({problem})")

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of `x` over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def all_reduce_max(self, x: torch.Tensor) -> torch.Tensor:
        """Largest of `x` over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x

    def all_gather_last(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [N, C] of all ranks side by side: [N, C * size], in the order of the ranks."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)

    def partial_buffer(self, slot: int, tokens: int, size: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Where to write partial sums [tokens, size] that `all_reduce_add_norm` is given next; None: in any fresh tensor.

        Args:
            slot: 0, 1 or 2, another than in the call before: a layer's two sums take turns, and a model's step begins with
                another slot than it ends with. See `kernels.all_reduce`.
        """
        return None if self.reducer is None else self.reducer.buffer(slot, tokens, size, dtype)

    def all_reduce_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum `x` over all ranks and add `residual`: the RMSNorm of that and the sum itself, the same on all ranks.

        Args:
            x: [T, H] this rank's partial sums: all of what the last `partial_buffer` returned, or a tensor to be overwritten.
            residual: [T, H], the same on all ranks, or None; weight: [H].
        """
        if self.reducer is not None and self.reducer.holds(x):
            return self.reducer.add_rms_norm(x, residual, weight, eps)
        kernel = add_rms_norm if use_triton(x) else add_rms_norm_torch
        return kernel(self.all_reduce(x), residual, weight, eps)

    def shard(self, total: int) -> int:
        """This rank's part of a dimension; preflight has checked that it divides."""
        if total % self.size:
            raise ValueError(f"{total} does not divide by tensor_parallel_size={self.size}")
        return total // self.size


def _open_one_shot(
    rank: int, size: int, group: dist.ProcessGroup | None, device: torch.device
) -> tuple[OneShotAllReduce | None, str | None]:
    """The one-kernel sum, or None and why this group has none."""
    opened: list[OneShotAllReduce] = []

    def open_memory() -> None:
        opened.append(_rendezvous(rank, size, group, device))

    def compile_kernel() -> None:  # by each rank in its own time, so nobody waits for anybody yet
        _call_and_check(opened[0], device, turn=0, tokens=1, spins=1)
        torch.cuda.synchronize(device)

    def reset() -> None:
        opened[0].reset()
        torch.cuda.synchronize(device)

    def try_out() -> None:  # none of this can be known from what the driver says it can do
        counts = (1, 7, opened[0].programs + 5) * 2
        # All of them, though one failed: the other ranks make as many.
        right = [_call_and_check(opened[0], device, turn, count, TRIAL_SPINS) for turn, count in enumerate(counts)]
        if not all(right):
            raise RuntimeError("a trial of the one-kernel sum gave wrong results")

    for stage in (lambda: _check_fit(rank, size, device), open_memory, compile_kernel, reset, try_out):
        problem = None
        try:
            stage()
        except Exception as error:  # torch's interface is young: whatever it raises, there is NCCL
            problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        # Agreed on before the next stage, so that no rank waits there for one that has given up.
        problems: list[str | None] = [None] * size
        dist.all_gather_object(problems, problem, group=group)
        for culprit, text in enumerate(problems):
            if text is not None:
                return None, f"rank {culprit}: {text}"
    return opened[0], None


def _check_fit(rank: int, size: int, device: torch.device) -> None:
    """Raise RuntimeError where this rank knows beforehand that the sum cannot be, or is not to be, taken by one kernel."""
    if os.environ.get(SWITCH) == "0":
        raise RuntimeError(f"{SWITCH}=0")
    if not HAS_TRITON:
        raise RuntimeError("Triton is not installed")
    if device.type == "cuda" and (device.index != rank or torch.cuda.device_count() < size):
        raise RuntimeError("the ranks see no GPUs but their own")
    if not all(torch.cuda.can_device_access_peer(rank, peer) for peer in range(size) if peer != rank):
        raise RuntimeError("the GPUs do not reach each other's memory")


def _rendezvous(rank: int, size: int, group: dist.ProcessGroup | None, device: torch.device) -> OneShotAllReduce:
    """Allocate this rank's symmetric memory and learn where the others' is."""
    import torch.distributed._symmetric_memory as symm_mem

    multiprocessors = min(torch.cuda.get_device_properties(peer).multi_processor_count for peer in range(size))
    programs, slot_bytes = most_programs(multiprocessors), PULLED_BYTES // (size - 1)
    count = OneShotAllReduce.memory_bytes(size, programs, slot_bytes)
    memory = symm_mem.empty(count, dtype=torch.uint8, device=device)
    handle = symm_mem.rendezvous(memory, group if group is not None else dist.group.WORLD)
    addresses = [handle.get_buffer(peer, (count,), torch.uint8).data_ptr() for peer in range(size)]
    # In some releases these are where the allocations begin, and the tensor lies somewhere inside, on all ranks alike.
    inset = memory.data_ptr() - addresses[rank]
    if not 0 <= inset <= handle.buffer_size - count:
        raise RuntimeError("symmetric memory is laid out in another way than was expected")
    addresses = [address + inset for address in addresses]
    return OneShotAllReduce(memory, addresses, rank, programs, slot_bytes, handle=handle)


def _call_and_check(reducer: OneShotAllReduce, device: torch.device, turn: int, tokens: int, spins: int) -> bool:
    """One call on random numbers that every rank knows: whether it gave what the reference gives."""
    generator = torch.Generator().manual_seed(turn)
    shapes: list[tuple[int, ...]] = [(reducer.size, tokens, 256), (tokens, 256), (256,)]
    values = [torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes]
    partials, residual, weight = values
    expected, expected_total = all_reduce_add_rms_norm_torch(list(partials), residual, weight, 1e-6)
    buffer = reducer.buffer(turn % SLOTS, tokens, 256, torch.bfloat16)
    if buffer is None:
        return False
    buffer.copy_(partials[reducer.rank])
    normed, total = reducer.add_rms_norm(buffer, residual, weight, 1e-6, spins=spins)
    return bool(torch.equal(total, expected_total) and torch.allclose(normed, expected, rtol=0.02, atol=0.02))
