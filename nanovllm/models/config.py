"""`config.json` as the engine sees it: one frozen record for every family. Read by preflight checks (no torch) and models.

The file is read directly, not through transformers, so the forms written by transformers 4.x (`rope_theta`,
`rope_scaling`, `torch_dtype`) and 5.x (`rope_parameters`, `dtype`) mean the same here whichever is installed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.errors import UserError
from nanovllm.models.quantization import Quantization, read_quantization

# Kinds of rope scaling, and the numbers each must have.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `type` is one of `ROPE_TYPES`; `scaling` holds that type's own keys as written in the config."""

    theta: float
    type: str
    scaling: Mapping[str, Any]

    def max_position(self, max_position_embeddings: int) -> int:
        """Positions the model can use, YaRN's stretched range included."""
        if self.type == "yarn" and self.scaling.get("factor"):
            original = self.scaling["original_max_position_embeddings"]
            return max(max_position_embeddings, int(original * self.scaling["factor"]))
        return max_position_embeddings


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and switches of a decoder-only model, the same fields for every family."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: str
    eos_token_ids: tuple[int, ...]
    quantization: Quantization | None = None

    @classmethod
    def from_dir(cls, model_dir: Path, known_architectures: Mapping[str, Any]) -> ModelConfig:
        """Read `config.json` and `generation_config.json` of `model_dir`.

        Raises:
            UserError: file missing or unreadable, an architecture not in `known_architectures`, a missing size, or an
                option (activation, rope type, sliding window) that changes the result and is not implemented.
        """
        config = _read_json(model_dir / "config.json", required=True)
        names = config.get("architectures") or []
        names = names if isinstance(names, list) else [names]
        name = next((n for n in names if n in known_architectures), None)
        if name is None:
            given = ", ".join(map(str, names)) or "none"
            raise UserError(
                f"{model_dir / 'config.json'} names the architecture {given}, which is not known; "
                f"known: {', '.join(sorted(known_architectures))}; use a model of one of these"
            )
        defaults = known_architectures[name].config_defaults
        # A null size means the family's own; a null end-of-sequence id means that there is none.
        config = {**defaults, **{k: v for k, v in config.items() if v is not None or k == "eos_token_id"}}
        try:
            return cls._from_json(name, config, model_dir)
        except KeyError as error:
            raise UserError(
                f"{model_dir / 'config.json'} lacks the key {error}; take the model's original file"
            ) from None

    @classmethod
    def _from_json(cls, name: str, config: Mapping[str, Any], model_dir: Path) -> ModelConfig:
        _refuse_unsupported(config, model_dir)
        _check_sizes(config, model_dir)
        num_heads = config["num_attention_heads"]
        return cls(
            architecture=name,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads", num_heads),
            head_dim=config.get("head_dim", config["hidden_size"] // num_heads),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=_rope(config, model_dir),
            max_position_embeddings=config["max_position_embeddings"],
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            dtype=str(config.get("dtype", config.get("torch_dtype", "float32"))).removeprefix("torch."),
            eos_token_ids=_eos_token_ids(config, model_dir),
            quantization=read_quantization(config, model_dir / "config.json"),
        )


def _read_json(path: Path, required: bool) -> dict[str, Any]:
    if not path.is_file():
        if required:
            raise UserError(f"{path} does not exist; a model directory holds config.json and *.safetensors")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); download the model again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object; download the model again")
    return content


def _eos_token_ids(config: Mapping[str, Any], model_dir: Path) -> tuple[int, ...]:
    """All end-of-sequence ids: those of generation_config.json, or else config.json's."""
    generation = _read_json(model_dir / "generation_config.json", required=False)
    ids = generation.get("eos_token_id", config.get("eos_token_id"))
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)


def _rope(config: Mapping[str, Any], model_dir: Path) -> RopeConfig:
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    theta = scaling.pop("rope_theta", config.get("rope_theta", 10000.0))
    if kind not in ROPE_TYPES:
        raise UserError(
            f"{model_dir / 'config.json'} asks for the rope type {kind!r}, which is not known; known: {', '.join(ROPE_TYPES)}"
        )
    for key in ROPE_TYPES[kind]:
        if not isinstance(scaling.get(key), (int, float)) or scaling[key] <= 0:
            raise UserError(
                f"{model_dir / 'config.json'} gives the rope type {kind!r} {key}={scaling.get(key)!r}; it must be a "
                "number above 0; take the model's original file"
            )
    if scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(
            f"{model_dir / 'config.json'} sets partial_rotary_factor, which is not supported; it must be 1.0"
        )
    if kind in ("llama3", "yarn"):
        scaling.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return RopeConfig(theta=float(theta), type=kind, scaling=scaling)


def _check_sizes(config: Mapping[str, Any], model_dir: Path) -> None:
    """Refuse sizes no model can have, before they become an arithmetic error somewhere else."""
    optional = [key for key in ("num_key_value_heads", "head_dim") if key in config]
    for key in [*_SIZES, *optional]:
        if type(config[key]) is not int or config[key] < 1:
            raise UserError(
                f"{model_dir / 'config.json'} gives {key}={config[key]!r}; it must be a whole number of 1 or more"
            )
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads", config["num_attention_heads"])
    if heads % kv_heads:
        raise UserError(
            f"{model_dir / 'config.json'} gives num_key_value_heads={kv_heads}, which does not divide "
            f"num_attention_heads={heads}"
        )
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    if head_dim % 2 or head_dim < 1:
        raise UserError(f"{model_dir / 'config.json'} gives head_dim={head_dim}; it must be even")


def _refuse_unsupported(config: Mapping[str, Any], model_dir: Path) -> None:
    """Refuse what would silently change the result."""
    where = model_dir / "config.json"
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(f"{where} asks for the activation {activation!r}; known: silu")
    layer_types = set(config.get("layer_types") or ())
    if (config.get("use_sliding_window") and config.get("sliding_window")) or layer_types - {"full_attention"}:
        raise UserError(
            f"{where} asks for sliding-window attention, which is not supported; set use_sliding_window to false"
        )
