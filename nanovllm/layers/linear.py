"""Linear layers in Megatron's column and row shards. Each parameter carries the `weight_loader` that cuts its own shard.

A weight loader is called as `loader(param, tensor, part)`: `tensor` is the full checkpoint tensor and `part` says which of a
fused layer's parts it is (None where the layer is not fused). A layer that `keeps` its weight quantised has no `weight`, and
`load_quantized` takes the checkpoint's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn
from torch.nn import functional as F

from nanovllm.kernels.lora import LowRank
from nanovllm.kernels.skinny_linear import SkinnyTiles, choose_tiles, skinny_linear
from nanovllm.layers.activation import gelu_and_mul, silu_and_mul
from nanovllm.layers.lora import LoraWeights
from nanovllm.layers.parallel import TensorParallel
from nanovllm.layers.quantized import Numbers, QuantizedWeight, RoundedRows, UnscaledSums, some_columns, some_rows
from nanovllm.models.quantization import WeightFormat, WeightScheme


class ParallelLinear(nn.Module, ABC):
    """What column and row shards share: a weight of this rank, plain or quantised, and adapters.

    Args:
        rows, columns: of this rank's weight.
    """

    def __init__(self, rows: int, columns: int, bias: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = rows, columns
        self.weight = _parameter(self.load, rows, columns)
        self.bias = _parameter(self.load, rows) if bias else None
        self.quantized: QuantizedWeight | None = None
        self.lora: LoraWeights | None = None

    @abstractmethod
    def load(self, param: nn.Parameter, tensor: torch.Tensor, part: str | None) -> None:
        """Copy this rank's part of a checkpoint tensor."""

    def keep(self, scheme: WeightScheme) -> None:
        """Have the weight quantised in place of the plain one, where `scheme` has a form for its shape."""
        form = scheme.kept(self.out_features, self.in_features)
        if form is None:
            return
        with self.weight.device:
            self.quantized = QuantizedWeight(self.out_features, self.in_features, form)
        del self.weight

    @abstractmethod
    def load_quantized(self, weight: Numbers | torch.Tensor, part: str | None) -> None:
        """As `load`, into the quantised weight; a plain `weight` is quantised."""

    def product(self, x: torch.Tensor | RoundedRows, bias: torch.Tensor | None) -> torch.Tensor:
        """`x` [T, in_features] times the weight, plus `bias`: [T, out_features]."""
        if self.quantized is not None:
            return self.quantized.linear(x, bias)
        assert isinstance(x, torch.Tensor)
        return F.linear(x, self.weight, bias)

    @property
    def takes_rounded(self) -> WeightFormat | None:
        """The weight's format, where activations are made 8 bits for it and nobody else asks for them; None where not."""
        if self.quantized is None or not self.quantized.form.activations or self.has_adapters:
            return None
        return self.quantized.form

    @property
    def has_adapters(self) -> bool:
        """Whether the layer has adapters, and some token of the step one."""
        return self.lora is not None and self.lora.active

    def low_rank(self, x: torch.Tensor, tiles: SkinnyTiles | None) -> LowRank | None:
        """What a product of `x` in `tiles` is to add for the tokens' adapters; None: nothing, or `adapted` does it."""
        if self.lora is None or tiles is None or not self.lora.active:
            return None
        return self.lora.low_rank(x, tiles.block_n)

    def adapted(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """`out`, the product of `x`, or partial sums of it, with what the tokens' adapters add."""
        return self.lora.add(x, out) if self.lora is not None and self.lora.active else out


class ColumnParallelLinear(ParallelLinear):
    """`y = x W^T + b`, output features sharded; several checkpoint matrices with one input may be fused into `parts`.

    Args:
        in_features: size of the last dimension of the input, unsharded.
        parts: for each fused matrix its name, the output features of this rank and the index of this rank's shard.
        totals: the unsharded output features of each part, for checkpoints that hold them fused.
    """

    def __init__(
        self, in_features: int, parts: dict[str, tuple[int, int]], bias: bool, totals: tuple[int, ...] = ()
    ) -> None:
        super().__init__(sum(rows for rows, _ in parts.values()), in_features, bias)
        self.totals = totals
        self.offsets: dict[str, tuple[int, int, int]] = {}
        start = 0
        for name, (rows, shard_index) in parts.items():
            self.offsets[name] = (start, rows, shard_index)
            start += rows

    def load(self, param: nn.Parameter, tensor: torch.Tensor, part: str | None) -> None:
        """Copy this rank's rows of checkpoint matrix `part`, or of all of them where `tensor` holds them one after the other."""
        rows = self._part_of_rank(tensor, part)
        start = 0 if part is None else self.offsets[part][0]
        param.data[start : start + len(rows)].copy_(rows)

    def load_quantized(self, weight: Numbers | torch.Tensor, part: str | None) -> None:
        """As `load`, into the quantised weight; a plain `weight` is quantised."""
        assert self.quantized is not None
        start = 0 if part is None else self.offsets[part][0]
        self.quantized.put(start, some_rows(weight, lambda tensor: self._part_of_rank(tensor, part)))

    def _part_of_rank(self, tensor: torch.Tensor, part: str | None) -> torch.Tensor:
        if part is None:
            return self.rows_of_rank(tensor)
        _, rows, shard_index = self.offsets[part]
        return tensor[shard_index * rows : (shard_index + 1) * rows]

    def rows_of_rank(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's rows of all matrices, of a `tensor` that holds them whole, one after the other."""
        parts = zip(tensor.split(self.totals), self.offsets.values(), strict=True)
        return torch.cat([whole[shard * rows : (shard + 1) * rows] for whole, (_, rows, shard) in parts])

    def forward(self, x: torch.Tensor | RoundedRows) -> torch.Tensor:
        """[T, in_features] -> [T, sum of this rank's rows]. `x` is rounded only where the layer `takes_rounded`."""
        if isinstance(x, RoundedRows):
            return self.product(x, self.bias)
        tiles = None if self.quantized is not None else choose_tiles(x, self.weight)
        low_rank = self.low_rank(x, tiles)
        if tiles is not None:
            out = skinny_linear(x, self.weight, tiles, self.bias, low_rank=low_rank)
        else:
            out = self.product(x, self.bias)
        return out if low_rank is not None else self.adapted(x, out)


class GatedColumnParallelLinear(ColumnParallelLinear):
    """SwiGLU's two projections and their product, `silu(x G^T) * (x U^T)`; `parts` are the gate and up, in that order.

    Args:
        activation: "silu", or "gelu_pytorch_tanh" for GeGLU.
    """

    def __init__(
        self, in_features: int, features: int, bias: bool, tp: TensorParallel, activation: str = "silu"
    ) -> None:
        rows = tp.shard(features)
        parts = {"gate": (rows, tp.rank), "up": (rows, tp.rank)}
        super().__init__(in_features, parts, bias, (features, features))
        self.activation = activation

    def forward(self, x: torch.Tensor | RoundedRows, rounded: WeightFormat | None = None) -> torch.Tensor | RoundedRows:
        """[T, in_features] -> [T, this rank's rows of one part], `rounded` for the product that comes next."""
        if rounded is not None and self.activation == "silu":
            return RoundedRows.of(super().forward(x), rounded, gated=True)
        if self.activation != "silu":
            return gelu_and_mul(super().forward(x))
        if isinstance(x, RoundedRows):
            return silu_and_mul(super().forward(x))
        tiles = None if self.quantized is not None else choose_tiles(x, self.weight, gated=True)
        low_rank = self.low_rank(x, tiles)
        if tiles is not None and (low_rank is not None or not self.has_adapters):
            return skinny_linear(x, self.weight, tiles, self.bias, gated=True, low_rank=low_rank)
        return silu_and_mul(self.adapted(x, self.product(x, self.bias)))


def qkv_parallel_linear(
    hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, bias: bool, tp: TensorParallel
) -> ColumnParallelLinear:
    """Fused query, key and value projection of one rank; KV heads are replicated where there are fewer than ranks."""
    kv_rows = max(1, num_kv_heads // tp.size) * head_dim
    # With fewer KV heads than ranks, size / num_kv_heads neighbouring ranks hold the same head.
    kv_shard = tp.rank * num_kv_heads // tp.size if num_kv_heads < tp.size else tp.rank
    parts = {"q": (tp.shard(num_heads) * head_dim, tp.rank), "k": (kv_rows, kv_shard), "v": (kv_rows, kv_shard)}
    totals = num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim
    return ColumnParallelLinear(hidden_size, parts, bias, totals)


class RowParallelLinear(ParallelLinear):
    """`y = x W^T + b`, input features sharded: each rank has partial sums of `y`, and rank 0's hold the bias.

    Nothing is added up here: `RMSNorm.add_norm`, which comes next, does it along with the residual.

    Args:
        slot: where in the ranks' common memory the sums go, see `TensorParallel.partial_buffer`.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, tp: TensorParallel, slot: int) -> None:
        super().__init__(out_features, tp.shard(in_features), bias)
        self.tp = tp
        self.slot = slot
        # Whether a rank that is alone may return its sums in parts; no, where no residual addition follows.
        self.splits = True

    def load(self, param: nn.Parameter, tensor: torch.Tensor, part: str | None) -> None:
        """Copy this rank's columns of the weight; the bias is whole on every rank."""
        if tensor.dim() == 2:
            tensor = tensor[:, self._columns_of_rank]
        param.data.copy_(tensor)

    def load_quantized(self, weight: Numbers | torch.Tensor, part: str | None) -> None:
        """As `load`, into the quantised weight; a plain `weight` is quantised."""
        assert self.quantized is not None
        self.quantized.put(0, some_columns(weight, self._columns_of_rank))

    @property
    def _columns_of_rank(self) -> slice:
        return slice(self.tp.rank * self.in_features, (self.tp.rank + 1) * self.in_features)

    def forward(self, x: torch.Tensor | RoundedRows) -> torch.Tensor | UnscaledSums:
        """[T, in_features / size] -> this rank's partial sums [T, out_features], or [S, T, out_features] in float32."""
        bias = self.bias if self.tp.rank == 0 else None
        if self.quantized is not None and self.splits and self.tp.size == 1 and bias is None and not self.has_adapters:
            unscaled = self.quantized.unscaled(x)
            if unscaled is not None:
                return unscaled
        if self.tp.size > 1:
            out = self._into_buffer(x, bias)
        elif self.quantized is not None:
            out = self.quantized.linear(x, bias, partial=self.splits)
        else:
            assert isinstance(x, torch.Tensor)
            tiles = choose_tiles(x, self.weight, partial=self.splits)
            low_rank = self.low_rank(x, tiles)
            if tiles is None:
                out = self.product(x, bias)
            else:
                out = skinny_linear(x, self.weight, tiles, bias, low_rank=low_rank)
            if low_rank is not None:
                return out
        if not self.has_adapters:
            return out
        assert isinstance(x, torch.Tensor)
        return self.adapted(x, out)

    def _into_buffer(self, x: torch.Tensor | RoundedRows, bias: torch.Tensor | None) -> torch.Tensor:
        """The product, in the ranks' common memory where there is any for it."""
        out = self.tp.partial_buffer(self.slot, len(x), self.out_features, x.dtype)
        if out is None:
            return self.product(x, bias)
        if self.quantized is not None:
            return self.quantized.linear(x, bias, out)
        assert isinstance(x, torch.Tensor)
        weight = self.weight.t()
        return torch.mm(x, weight, out=out) if bias is None else torch.addmm(bias, x, weight, out=out)


def _parameter(loader: object, *shape: int) -> nn.Parameter:
    param = nn.Parameter(torch.empty(*shape), requires_grad=False)
    param.weight_loader = loader
    return param
