"""Weights that stay quantised on the device: what they are made of, and products with them. Owned by linear layers and experts.

N output features, K input features, G scales a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from nanovllm.kernels.packed_linear import (
    MIDDLE,
    pack_columns,
    packed_linear,
    packed_linear_torch,
    unpack_weight_torch,
)
from nanovllm.kernels.quantize import quantize_rows, quantize_rows_torch
from nanovllm.kernels.scaled_linear import scaled_linear, scaled_linear_torch, unscaled_linear, unscaled_pays
from nanovllm.kernels.triton_compat import multiprocessors, use_triton
from nanovllm.models.quantization import WeightFormat

DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
# Rows that are quantised at a time: what that takes beside the weight is small.
ROWS_AT_ONCE = 1024


class Numbers(NamedTuple):
    """A weight [N, K], or some rows or columns of one: (values - zero) * scale.

    Attributes:
        values: [N, K] float8_e4m3fn, or integers around zero.
        scale: [N, G] float32; zero: [N, G] integers, None for none.
        group: neighbouring columns that share a scale, 0 for all; the last may be fewer.
        groups: [K] the group of each column where groups are no neighbours, else None.
    """

    values: torch.Tensor
    scale: torch.Tensor
    group: int = 0
    zero: torch.Tensor | None = None
    groups: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        """What it means: [N, K] float32."""
        values = self.values.float()
        if self.zero is not None:
            values = values - self._spread(self.zero.float())
        return values * self._spread(self.scale)

    def _spread(self, grouped: torch.Tensor) -> torch.Tensor:
        """[N, G] -> [N, K]."""
        if self.groups is not None:
            return grouped[:, self.groups.long()]
        if not self.group or grouped.shape[1] == 1:
            return grouped
        return grouped.repeat_interleave(self.group, 1)[:, : self.values.shape[1]]


def some_rows(weight: Numbers | torch.Tensor, take: Callable[[torch.Tensor], torch.Tensor]) -> Numbers | torch.Tensor:
    """What `take` leaves of the rows of a weight, plain or quantised."""
    if isinstance(weight, torch.Tensor):
        return take(weight)
    zero = None if weight.zero is None else take(weight.zero)
    return weight._replace(values=take(weight.values), scale=take(weight.scale), zero=zero)


def some_columns(weight: Numbers | torch.Tensor, columns: slice) -> Numbers | torch.Tensor:
    """Some columns of a weight, plain or quantised; they begin and end where groups do, which are neighbours."""
    if isinstance(weight, torch.Tensor):
        return weight[:, columns]
    groups = slice(columns.start // weight.group, columns.stop // weight.group) if weight.group else slice(None)
    zero = None if weight.zero is None else weight.zero[:, groups]
    return weight._replace(values=weight.values[:, columns], scale=weight.scale[:, groups], zero=zero)


def quantize(weight: torch.Tensor, form: WeightFormat) -> Numbers:
    """The nearest numbers to `weight` [N, K], without zero points."""
    if form.kind == "int4":
        values, scale = quantize_rows_torch(weight, torch.int8, form.group, largest=MIDDLE - 1)
    else:
        values, scale = quantize_rows_torch(weight, DTYPES[form.kind], form.group)
    return Numbers(values, scale.t(), form.group)


@dataclass(frozen=True)
class RoundedRows:
    """Activations [T, K] in 8 bits: `numbers`, and `scale` as in `kernels.quantize`; `dtype` is what they had and products have."""

    numbers: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, x: torch.Tensor, form: WeightFormat, *, gated: bool = False) -> RoundedRows:
        """`x` [T, K] as a weight in `form` wants it; gated: `x` [T, 2 * K] through SwiGLU's gate."""
        numbers, scale = (quantize_rows if use_triton(x) else quantize_rows_torch)(
            x, DTYPES[form.kind], form.group, gated=gated
        )
        return cls(numbers, scale, x.dtype)

    def __len__(self) -> int:
        """T."""
        return len(self.numbers)


@dataclass(frozen=True)
class UnscaledSums:
    """A product whose scales the norm after it applies: `sums` [T, N] times those of rows [T] and of columns [N]."""

    sums: torch.Tensor
    scales: tuple[torch.Tensor, torch.Tensor]


class QuantizedWeight(nn.Module):
    """A weight [rows, columns] in `form`, on the default device.

    `numbers` are [N, K], two a byte where they have 4 bits (`kernels.packed_linear`); `scale` [G, N] float32; `zero` [G, N] or None.
    """

    def __init__(self, rows: int, columns: int, form: WeightFormat) -> None:
        super().__init__()
        self.form = form
        self.columns = columns
        width, groups = columns // 2 if form.kind == "int4" else columns, columns // (form.group or columns)
        self.numbers = _parameter(torch.empty(rows, width, dtype=DTYPES[form.kind]))
        self.scale = _parameter(torch.empty(groups, rows, dtype=torch.float32))
        self.zero = _parameter(torch.empty(groups, rows, dtype=torch.int16)) if form.zeros else None

    def put(self, start: int, weight: Numbers | torch.Tensor) -> None:
        """Make the rows from `start` those of `weight`, which is quantised here where it is not."""
        if isinstance(weight, torch.Tensor):
            for first in range(0, len(weight), ROWS_AT_ONCE):
                piece = moved(weight[first : first + ROWS_AT_ONCE], self.numbers.device)
                self.put(start + first, quantize(piece, self.form))
            return
        rows, values, zero = slice(start, start + len(weight.values)), weight.values, weight.zero
        if self.form.kind == "int4":
            values, zero = pack_columns(values + MIDDLE), None if zero is None else zero + MIDDLE
        self.numbers.data[rows].copy_(values)
        self.scale.data[:, rows].copy_(weight.scale.t())
        if self.zero is not None:
            self.zero.data[:, rows].copy_(torch.zeros_like(weight.scale.t()) if zero is None else zero.t())

    def dequantize(self) -> torch.Tensor:
        """What it means: [N, K] float32."""
        return unpack_weight_torch(self.numbers, self.scale, self.zero, torch.float32)

    def linear(
        self,
        x: torch.Tensor | RoundedRows,
        bias: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        *,
        partial: bool = False,
    ) -> torch.Tensor:
        """`x` [T, K] times the weight, transposed, plus `bias` [N].

        Args:
            x: rounded already only where `form.activations`.
            out: [T, N] to write to, None: a fresh tensor.
            partial: whether the result may be partial sums [S, T, N] in float32.
        """
        if self.form.activations:
            x = x if isinstance(x, RoundedRows) else RoundedRows.of(x, self.form)
            run = scaled_linear if use_triton(x.numbers) else scaled_linear_torch
            return run(x.numbers, x.scale, self.numbers, self.scale, x.dtype, bias, out, partial=partial)
        assert isinstance(x, torch.Tensor)
        widen = packed_linear if use_triton(x) else packed_linear_torch
        return widen(x, self.numbers, self.scale, self.zero, bias, out, partial=partial)

    def unscaled(self, x: torch.Tensor | RoundedRows) -> UnscaledSums | None:
        """`linear` of bfloat16 activations without its scales, where that is faster; `x` as there."""
        eight_bits = self.numbers.dtype == torch.float8_e4m3fn and self.form.activations and len(self.scale) == 1
        if not eight_bits or not self.numbers.is_cuda or x.dtype != torch.bfloat16:
            return None
        if not unscaled_pays(len(x), len(self.numbers), multiprocessors(self.numbers.device)):
            return None
        x = x if isinstance(x, RoundedRows) else RoundedRows.of(x, self.form)
        return UnscaledSums(unscaled_linear(x.numbers, self.numbers), (x.scale[0], self.scale[0]))


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`, by a plain copy, which a loader may stage."""
    if tensor.device == device:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(tensor)


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
