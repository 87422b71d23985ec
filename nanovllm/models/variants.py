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
from nanovllm.models.config import ModelConfig, MoeConfig, named_layers, read_rope, with_windows

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


def qwen3_moe(model: ModelConfig, config: Json, where: Path) -> ModelConfig:
    """Experts in every layer, or every `decoder_sparse_step`-th, but for those in `mlp_only_layers`; a window in all or none."""
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    model = with_windows(model, [True] * model.num_layers, window, where)
    step = _count(config, ("decoder_sparse_step",), 1, where)
    dense = config.get("mlp_only_layers", [])
    sparse = [i not in dense and (i + 1) % step == 0 for i in range(model.num_layers)]
    normalize = bool(config.get("norm_topk_prob", False))
    size = _count(config, ("moe_intermediate_size",), 768, where)
    return _with_experts(model, config, sparse, (128, 8), size, normalize, where)


def mixtral(model: ModelConfig, config: Json, where: Path) -> ModelConfig:
    """Experts in every layer, a window where the file has one."""
    model = with_windows(model, [True] * model.num_layers, config.get("sliding_window"), where)
    return _with_experts(model, config, [True] * model.num_layers, (8, 2), model.intermediate_size, True, where)


def gemma2(model: ModelConfig, config: Json, where: Path) -> ModelConfig:
    """A window in every other layer from the first on, soft caps on scores and logits, embeddings scaled by their size's root."""
    model = _gemma(model, config, 2, where)
    return replace(model, attention_softcap=_cap(config, "attn_logit_softcapping", where))


def gemma3(model: ModelConfig, config: Json, where: Path) -> ModelConfig:
    """A window in all layers but every sixth, or as the file says; those with a window have positions of their own."""
    pattern = _count(config, ("sliding_window_pattern", "_sliding_window_pattern"), 6, where)
    model = _gemma(model, config, pattern, where)
    ropes = config.get("rope_parameters")
    local = dict((ropes or {}).get("sliding_attention") or {"rope_theta": config.get("rope_local_base_freq", 10000.0)})
    rope = read_rope({**config, "rope_parameters": local}, where.parent)
    names = named_layers(config, [(i + 1) % pattern != 0 for i in range(model.num_layers)], where)
    layers = [layer._replace(rope=rope) if slides else layer for layer, slides in zip(model.layers, names, strict=True)]
    return replace(model, layers=tuple(layers))


def _gemma(model: ModelConfig, config: Json, pattern: int, where: Path) -> ModelConfig:
    if config.get("use_bidirectional_attention"):
        raise UserError(f"{where} sets use_bidirectional_attention, which is for embeddings; it must be false")
    sliding = named_layers(config, [(i + 1) % pattern != 0 for i in range(model.num_layers)], where)
    model = with_windows(model, sliding, config.get("sliding_window"), where)
    return replace(
        model,
        embedding_scale=model.hidden_size**0.5,
        attention_scale=_number(config, "query_pre_attn_scalar", 256.0, where) ** -0.5,
        logit_softcap=_cap(config, "final_logit_softcapping", where),
    )


def _cap(config: Json, key: str, where: Path) -> float:
    """A soft cap; null is none."""
    return 0.0 if config.get(key) is None else _number(config, key, 0.0, where)


def _with_experts(
    model: ModelConfig,
    config: Json,
    sparse: list[bool],
    defaults: tuple[int, int],
    size: int,
    normalize: bool,
    where: Path,
) -> ModelConfig:
    """`model` with experts of `size` features in the layers that are `sparse`; `defaults`: how many, and how many a token takes."""
    count = _count(config, ("num_experts", "num_local_experts"), defaults[0], where)
    each = _count(config, ("num_experts_per_tok",), defaults[1], where)
    if each > count:
        raise UserError(f"{where} gives num_experts_per_tok={each}; there are {count} experts")
    layers = [layer._replace(sparse=has) for layer, has in zip(model.layers, sparse, strict=True)]
    moe = MoeConfig(count, each, size, normalize) if any(sparse) else None
    return replace(model, layers=tuple(layers), moe=moe)


def _count(config: Json, keys: tuple[str, ...], default: int, where: Path) -> int:
    """The number under the first of `keys` that is there."""
    key = next((key for key in keys if key in config), keys[0])
    value = config.get(key, default)
    if type(value) is not int or value < 1:
        raise UserError(f"{where} gives {key}={value!r}; it must be a whole number of 1 or more")
    return value


def _number(config: Json, key: str, default: float, where: Path) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise UserError(f"{where} gives {key}={value!r}; it must be a number above 0")
    return float(value)
