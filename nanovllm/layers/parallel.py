"""The tensor-parallel view of one rank: every sharded layer takes it as an argument, so several engines can live in one process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class TensorParallel:
    """Rank `rank` of `size` ranks that share one model. With `size` 1 no process group is needed and nothing is sent."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

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

    def shard(self, total: int) -> int:
        """This rank's part of a dimension; preflight has checked that it divides."""
        if total % self.size:
            raise ValueError(f"{total} does not divide by tensor_parallel_size={self.size}")
        return total // self.size
