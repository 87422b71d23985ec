"""Linear layers in Megatron's column and row shards. Each parameter carries the `weight_loader` that cuts its own shard.

A weight loader is called as `loader(param, tensor, part)`: `tensor` is the full checkpoint tensor and `part` says which of a
fused layer's parts it is (None where the layer is not fused).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from nanovllm.layers.parallel import TensorParallel


class ColumnParallelLinear(nn.Module):
    """`y = x W^T + b`, output features sharded; several checkpoint matrices with one input may be fused into `parts`.

    Args:
        in_features: size of the last dimension of the input, unsharded.
        parts: for each fused matrix its name, the output features of this rank and the index of this rank's shard.
    """

    def __init__(self, in_features: int, parts: dict[str, tuple[int, int]], bias: bool) -> None:
        super().__init__()
        self.offsets: dict[str, tuple[int, int, int]] = {}
        start = 0
        for name, (rows, shard_index) in parts.items():
            self.offsets[name] = (start, rows, shard_index)
            start += rows
        self.weight = _parameter(self.load, start, in_features)
        self.bias = _parameter(self.load, start) if bias else None

    def load(self, param: nn.Parameter, tensor: torch.Tensor, part: str | None) -> None:
        """Copy this rank's rows of checkpoint matrix `part`."""
        start, rows, shard_index = self.offsets[part or ""]
        param.data[start : start + rows].copy_(tensor[shard_index * rows : (shard_index + 1) * rows])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in_features] -> [T, sum of this rank's rows]."""
        return F.linear(x, self.weight, self.bias)


def qkv_parallel_linear(
    hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, bias: bool, tp: TensorParallel
) -> ColumnParallelLinear:
    """Fused query, key and value projection of one rank; KV heads are replicated where there are fewer than ranks."""
    kv_rows = max(1, num_kv_heads // tp.size) * head_dim
    # With fewer KV heads than ranks, size / num_kv_heads neighbouring ranks hold the same head.
    kv_shard = tp.rank * num_kv_heads // tp.size if num_kv_heads < tp.size else tp.rank
    parts = {"q": (tp.shard(num_heads) * head_dim, tp.rank), "k": (kv_rows, kv_shard), "v": (kv_rows, kv_shard)}
    return ColumnParallelLinear(hidden_size, parts, bias)


class RowParallelLinear(nn.Module):
    """`y = x W^T + b`, input features sharded; the ranks' partial sums are added, the bias once (on rank 0)."""

    def __init__(self, in_features: int, out_features: int, bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.weight = _parameter(self.load, out_features, tp.shard(in_features))
        self.bias = _parameter(self.load, out_features) if bias else None

    def load(self, param: nn.Parameter, tensor: torch.Tensor, part: str | None) -> None:
        """Copy this rank's columns of the weight; the bias is whole on every rank."""
        if tensor.dim() == 2:
            columns = param.shape[1]
            tensor = tensor[:, self.tp.rank * columns : (self.tp.rank + 1) * columns]
        param.data.copy_(tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in_features / size] -> [T, out_features], summed over ranks."""
        return self.tp.all_reduce(F.linear(x, self.weight, self.bias if self.tp.rank == 0 else None))


def _parameter(loader: object, *shape: int) -> nn.Parameter:
    param = nn.Parameter(torch.empty(*shape), requires_grad=False)
    param.weight_loader = loader
    return param
