"""What a family's `config.json` says beyond the common keys: one function a family, named by the registry. No torch here.

Each takes the `ModelConfig` of the common keys, the file's content (with the family's defaults) and its path, and returns the
whole; the defaults and rules are those of the family's class in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanovllm.errors import UserError
from nanovllm.models.config import ModelConfig, named_layers, with_windows

Json = Mapping[str, Any]


def granite(model: ModelConfig, config: Json, where: Path) -> ModelConfig:
    """Four multipliers; that of the logits is a divisor."""
    return replace(
        model,
        embedding_scale=_number(config, "embedding_multiplier", 1.0, where),
        residual_scale=_number(config, "residual_multiplier", 1.0, where),
        attention_scale=_number(config, "attention_multiplier", 1.0, where),
        logit_scale=1.0 / _number(config, "logits_scaling", 1.0, where),
    )


def smollm3(model: ModelConfig, config: Json, where: Path) -> ModelConfig:
    """Every fourth layer, or those that `no_rope_layers` marks by 0, has no rotary positions."""
    count = model.num_layers
    interval = config.get("no_rope_layer_interval", 4)
    rotated = config.get("no_rope_layers", [int((i + 1) % interval != 0) for i in range(count)])
    if not isinstance(rotated, list) or len(rotated) != count:
        raise UserError(f"{where} gives no_rope_layers={rotated!r}; it must hold 0 or 1 for each of {count} layers")
    layers = [layer if has else layer._replace(rope=None) for layer, has in zip(model.layers, rotated, strict=True)]
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    sliding = named_layers(config, [not has for has in rotated], where)
    return with_windows(replace(model, layers=tuple(layers)), sliding, window, where)


def phi3(model: ModelConfig, config: Json, where: Path) -> ModelConfig:
    """A window in every layer where the file has one."""
    return with_windows(model, [True] * model.num_layers, config.get("sliding_window"), where)


def mistral(model: ModelConfig, config: Json, where: Path) -> ModelConfig:
    """A window in every layer; files of versions without one say null."""
    sliding = named_layers(config, [True] * model.num_layers, where)
    return with_windows(model, sliding, config.get("sliding_window"), where)


def qwen(model: ModelConfig, config: Json, where: Path) -> ModelConfig:
    """A window, where it is switched on, in the layers from `max_window_layers` on or in those that `layer_types` names."""
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    first = config.get("max_window_layers", 28)
    sliding = named_layers(config, [i >= first for i in range(model.num_layers)], where)
    if window is None and any(sliding):
        if "layer_types" in config:
            raise UserError(
                f"{where} names layers of sliding_attention and no window; set use_sliding_window to true and sliding_window to "
                "the window's tokens, or every layer of layer_types to full_attention"
            )
        return model
    return with_windows(model, sliding, window, where)


def _number(config: Json, key: str, default: float, where: Path) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise UserError(f"{where} gives {key}={value!r}; it must be a number above 0")
    return float(value)
