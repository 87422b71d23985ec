"""Rotary position embedding (Su et al. 2021) with linear, Llama 3, YaRN and LongRoPE scaling, precomputed as one table for all layers that share it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nanovllm.models.config import RopeConfig


class RotaryEmbedding(nn.Module):
    """A table of cosines and sines, [max_position, R] each, in the model's type; shared by all layers with the same `rope`.

    `kernels.qk_norm_rope` rotates by it the first R of a head's dimensions, all of them unless the model says otherwise. Without
    `rope` the angles are 0.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, rope: RopeConfig | None, head_dim: int, max_position: int) -> None:
        super().__init__()
        # On the CPU whatever the default device is: the table must not depend on a device's arithmetic.
        with torch.device("cpu"):
            if rope is None:
                inv_freq, attention_factor = torch.zeros(head_dim // 2), 1.0
            else:
                inv_freq, attention_factor = inverse_frequencies(rope, int(head_dim * rope.partial))
            angles = torch.outer(torch.arange(max_position, dtype=torch.float32), inv_freq)
            angles = torch.cat((angles, angles), dim=-1)
            cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor
        self.register_buffer("cos", cos.to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("sin", sin.to(torch.get_default_dtype()), persistent=False)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [head_dim / 2] in float32 of `head_dim` rotated dimensions, and the factor that scales cosines and sines."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / (rope.theta**exponents)
    if rope.type == "linear":
        return inv_freq / rope.scaling["factor"], 1.0
    if rope.type == "llama3":
        return _llama3(inv_freq, rope.scaling), 1.0
    if rope.type == "yarn":
        return _yarn(rope.theta**exponents, rope, head_dim)
    if rope.type == "longrope":
        return _longrope(rope.theta**exponents, rope.scaling)
    return inv_freq, 1.0


def _llama3(inv_freq: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between blended."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(between, blended, scaled)


def _yarn(wavelengths: torch.Tensor, rope: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al. 2023): NTK-by-parts interpolation and an attention temperature."""
    scaling = rope.scaling
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]

    def correction_dim(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = correction_dim(scaling.get("beta_fast") or 32)
    high = correction_dim(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    extrapolate = 1 - ramp
    inv_freq = 1.0 / (factor * wavelengths) * (1 - extrapolate) + 1.0 / wavelengths * extrapolate
    return inv_freq, _yarn_attention_factor(scaling, factor)


def _longrope(wavelengths: torch.Tensor, scaling: Mapping[str, Any]) -> tuple[torch.Tensor, float]:
    """LongRoPE (Ding et al. 2024) up to the length the model was first trained for, see `RopeConfig.max_position`."""
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return 1.0 / (torch.tensor(scaling["short_factor"], dtype=torch.float32) * wavelengths), float(attention_factor)


def _yarn_attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)
