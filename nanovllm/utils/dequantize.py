"""Weights of quantised checkpoints as plain matrices, on the CPU or a GPU. What the tensors mean is in `models.quantization`."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nanovllm.models.quantization import WeightScheme

# Where AutoAWQ puts the number j of each eight in a 32-bit word, in the order of the bits.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def dequantize(scheme: WeightScheme, tensors: Mapping[str, torch.Tensor], columns: int) -> torch.Tensor:
    """The weight [N, K] in float32.

    Args:
        tensors: those of `scheme.shapes`, and any of `scheme.optional`, by name.
        columns: K.
    """
    if scheme.packing == "awq":
        return _awq(scheme, tensors, columns)
    if scheme.packing == "gptq":
        return _gptq(scheme, tensors, columns)
    scale = tensors[scheme.scale].float()
    zero = tensors.get("weight_zero_point")
    if scheme.packing == "int32":
        values = unpack(tensors["weight_packed"], scheme.bits)[:, :columns] - (1 << (scheme.bits - 1))
        if zero is not None:
            rows = len(values)
            zero = unpack(zero.t(), scheme.bits)[:, :rows].t() - (1 << (scheme.bits - 1))
    else:
        values = tensors["weight"]
    values = values.float()
    if scheme.strategy == "block":
        return values * _spread(scale, scheme.block, values.shape)
    if scheme.strategy == "tensor":
        return (values - (0 if zero is None else zero.float().reshape(()))) * scale.reshape(())
    grouped = values.view(len(values), scale.shape[1], -1)
    if zero is not None:
        grouped = grouped - zero.float().unsqueeze(-1)
    return (grouped * scale.unsqueeze(-1)).view(values.shape)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned numbers [N, W * 32 / bits] of `bits` bits from int32 `words` [N, W], the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).reshape(len(words), -1)


def _spread(scale: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """A scale for each number of a weight, whose last blocks may be cut."""
    scale = scale.repeat_interleave(block[0], 0)[: shape[0]]
    return scale.repeat_interleave(block[1], 1)[:, : shape[1]]


def _awq(scheme: WeightScheme, tensors: Mapping[str, torch.Tensor], columns: int) -> torch.Tensor:
    order = torch.argsort(torch.tensor(AWQ_ORDER, device=tensors["qweight"].device))

    def ordered(words: torch.Tensor) -> torch.Tensor:
        return unpack(words, scheme.bits).view(len(words), -1, len(order))[..., order].reshape(len(words), -1)

    values = ordered(tensors["qweight"]).float()  # [K, N]
    scale = tensors["scales"].float()  # [groups, N]
    half = float(1 << (scheme.bits - 1))
    zero = ordered(tensors["qzeros"]).float() if "qzeros" in tensors else torch.full_like(scale, half)
    grouped = values.view(len(scale), -1, values.shape[1])
    return ((grouped - zero.unsqueeze(1)) * scale.unsqueeze(1)).view(columns, -1).t()


def _gptq(scheme: WeightScheme, tensors: Mapping[str, torch.Tensor], columns: int) -> torch.Tensor:
    values = unpack(tensors["qweight"].t(), scheme.bits)[:, :columns].t().float()  # [K, N]
    # One less than a zero point of 0 was stored with all bits set.
    zero = ((unpack(tensors["qzeros"], scheme.bits) + scheme.zero_shift) & ((1 << scheme.bits) - 1)).float()
    scale = tensors["scales"].float()
    group = tensors.get("g_idx")
    if group is None:
        group = torch.arange(columns, device=values.device) // (scheme.group or columns)
    return ((values - zero[group.long()]) * scale[group.long()]).t()
