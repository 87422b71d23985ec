"""Weights of quantised checkpoints as numbers with scales, on the CPU or a GPU. What the tensors mean is in `models.quantization`."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nanovllm.layers.quantized import Numbers
from nanovllm.models.quantization import WeightScheme

# Where AutoAWQ puts the number j of each eight in a 32-bit word, in the order of the bits.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def read_numbers(scheme: WeightScheme, tensors: Mapping[str, torch.Tensor], columns: int) -> Numbers:
    """The weight [N, K] as it is stored, one layout for all.

    Args:
        tensors: those of `scheme.shapes`, and any of `scheme.names`, by name.
        columns: K.
    """
    if scheme.packing == "awq":
        return _awq(scheme, tensors)
    if scheme.packing == "gptq":
        return _gptq(scheme, tensors, columns)
    scale = tensors[scheme.scale].float()
    zero = tensors.get("weight_zero_point")
    if scheme.packing == "int32":
        values = _around_zero(unpack(tensors["weight_packed"], scheme.bits)[:, :columns], scheme.bits)
        if zero is not None:
            zero = _around_zero(unpack(zero.t(), scheme.bits)[:, : len(values)].t(), scheme.bits)
    else:
        values = tensors["weight"]
    rows = len(values)
    if scheme.strategy == "block":
        return Numbers(values, scale.repeat_interleave(scheme.block[0], 0)[:rows], scheme.block[1])
    if scheme.strategy == "tensor":
        scale, zero = (None if one is None else one.reshape(1, 1).expand(rows, 1) for one in (scale, zero))
    assert scale is not None
    return Numbers(values, scale, scheme.group, zero)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned numbers [N, W * 32 / bits] of `bits` bits from int32 `words` [N, W], the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).reshape(len(words), -1)


def _around_zero(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned numbers of `bits` bits less half of their range."""
    return (numbers - (1 << (bits - 1))).to(torch.int8)


def _awq(scheme: WeightScheme, tensors: Mapping[str, torch.Tensor]) -> Numbers:
    order = torch.argsort(torch.tensor(AWQ_ORDER, device=tensors["qweight"].device))

    def ordered(words: torch.Tensor) -> torch.Tensor:
        numbers = unpack(words, scheme.bits).view(len(words), -1, len(order))[..., order]
        return _around_zero(numbers.reshape(len(words), -1), scheme.bits).t()

    zero = ordered(tensors["qzeros"]) if "qzeros" in tensors else None
    return Numbers(ordered(tensors["qweight"]), tensors["scales"].float().t(), scheme.group, zero)


def _gptq(scheme: WeightScheme, tensors: Mapping[str, torch.Tensor], columns: int) -> Numbers:
    values = _around_zero(unpack(tensors["qweight"].t(), scheme.bits)[:, :columns], scheme.bits)
    # One less than a zero point of 0 was stored with all bits set.
    zero = (unpack(tensors["qzeros"], scheme.bits) + scheme.zero_shift) & ((1 << scheme.bits) - 1)
    groups = tensors.get("g_idx")
    if groups is not None and torch.equal(groups, torch.arange(columns).to(groups) // (scheme.group or columns)):
        groups = None
    return Numbers(values, tensors["scales"].float().t(), scheme.group, _around_zero(zero, scheme.bits).t(), groups)
