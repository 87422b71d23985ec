"""`config.json` as the engine sees it: one frozen record for every family. Read by preflight checks (no torch) and models.

The file is read directly, not through transformers, so the forms written by transformers 4.x (`rope_theta`,
`rope_scaling`, `torch_dtype`) and 5.x (`rope_parameters`, `dtype`) mean the same here whichever is installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from nanovllm.errors import UserError
from nanovllm.models.quantization import Quantization, read_quantization

# Kinds of rope scaling, and the numbers each must have.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": (),
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
    """Rotary embedding: `type` is one of `ROPE_TYPES`; `scaling` holds that type's own keys as written in the config; the first
    `partial` of each head's dimensions are rotated, the others have no position."""

    theta: float
    type: str
    scaling: Mapping[str, Any]
    partial: float = 1.0

    def max_position(self, max_position_embeddings: int) -> int:
        """Positions the model can use, YaRN's stretched range included.

        LongRoPE has one set of angles up to the length the model was first trained for and another beyond: a sequence that grows
        past it would have keys of both in its cache, so it may not.
        """
        if self.type == "longrope":
            return min(max_position_embeddings, int(self.scaling["original_max_position_embeddings"]))
        if self.type == "yarn" and self.scaling.get("factor"):
            original = self.scaling["original_max_position_embeddings"]
            return max(max_position_embeddings, int(original * self.scaling["factor"]))
        return max_position_embeddings


class LayerConfig(NamedTuple):
    """What may differ between the layers of one model.

    Attributes:
        window: tokens a query sees, its own among them; 0: all before it.
        rope: rotary positions, None for none.
        sparse: whether the feed-forward block is a mixture of experts.
    """

    window: int
    rope: RopeConfig | None
    sparse: bool = False


class MoeConfig(NamedTuple):
    """A mixture of experts: how many there are and how many a token takes, their size, and whether a token's weights add up to 1.

    Attributes:
        parallel: ranks hold whole experts, not a part of each.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    normalize: bool
    parallel: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and switches of a decoder-only model, the same fields for every family.

    Attributes:
        layers: a record a layer.
        embedding_scale, logit_scale: what embeddings and logits are multiplied by; attention_scale: what scores are, 0: by
            `head_dim ** -0.5`.
        residual_scale: what a block's output is multiplied by before it is added to the residual.
        attention_softcap, logit_softcap: a score x becomes cap * tanh(x / cap); 0: it stays.
    """

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
    layers: tuple[LayerConfig, ...]
    activation: str = "silu"
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float = 0.0
    logit_scale: float = 1.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    moe: MoeConfig | None = None
    quantization: Quantization | None = None

    @classmethod
    def from_dir(cls, model_dir: Path, known_architectures: Mapping[str, FamilyConfig]) -> ModelConfig:
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
        family = known_architectures[name]
        # A null size means the family's own; a null end-of-sequence id means that there is none, a null window the same.
        nulls = ("eos_token_id", "sliding_window", "final_logit_softcapping", "attn_logit_softcapping")
        config = {**family.config_defaults, **{k: v for k, v in config.items() if v is not None or k in nulls}}
        try:
            return cls._from_json(name, config, model_dir, family)
        except KeyError as error:
            raise UserError(
                f"{model_dir / 'config.json'} lacks the key {error}; take the model's original file"
            ) from None

    @classmethod
    def _from_json(cls, name: str, config: Mapping[str, Any], model_dir: Path, family: FamilyConfig) -> ModelConfig:
        _refuse_unsupported(config, model_dir, family)
        _check_sizes(config, model_dir)
        num_heads = config["num_attention_heads"]
        rope = read_rope(config, model_dir, family.partial_rotary)
        model = cls(
            architecture=name,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads", num_heads),
            head_dim=config.get("head_dim", config["hidden_size"] // num_heads),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=rope,
            max_position_embeddings=config["max_position_embeddings"],
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            dtype=str(config.get("dtype", config.get("torch_dtype", "float32"))).removeprefix("torch."),
            eos_token_ids=_eos_token_ids(config, model_dir),
            quantization=read_quantization(config, model_dir / "config.json"),
            layers=(LayerConfig(0, rope),) * config["num_hidden_layers"],
            activation=family.activation,
        )
        return model if family.refine is None else family.refine(model, config, model_dir / "config.json")


class FamilyConfig(Protocol):
    """What the registry says about reading a family's `config.json`, see `registry.Family`."""

    @property
    def config_defaults(self) -> Mapping[str, Any]:
        """Values that the file may leave out."""

    @property
    def activation(self) -> str:
        """The feed-forward block's, as the file must name it."""

    @property
    def windows(self) -> bool:
        """Whether layers may have a sliding window."""

    @property
    def partial_rotary(self) -> bool:
        """Whether only a part of a head's dimensions may be rotated."""

    @property
    def refine(self) -> Callable[[ModelConfig, Mapping[str, Any], Path], ModelConfig] | None:
        """Adds what this family's file says beyond the common keys."""


def with_windows(model: ModelConfig, sliding: list[bool], window: int | None, where: Path) -> ModelConfig:
    """`model` with a window of `window` tokens in the layers that are `sliding`; None: nowhere."""
    if window is None:
        return model
    if type(window) is not int or window < 1:
        raise UserError(f"{where} gives sliding_window={window!r}; it must be a whole number of 1 or more, or null")
    layers = [
        layer._replace(window=window) if slides else layer for layer, slides in zip(model.layers, sliding, strict=True)
    ]
    return replace(model, layers=tuple(layers))


def named_layers(config: Mapping[str, Any], otherwise: list[bool], where: Path) -> list[bool]:
    """Which layers slide: as `layer_types` lists them, `otherwise` where the file has no such list.

    Raises:
        UserError: a list of another length, or with a kind of layer that is not known.
    """
    names = config.get("layer_types")
    if names is None:
        return otherwise
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(names, list) or len(names) != config["num_hidden_layers"] or not set(names) <= set(kinds):
        raise UserError(
            f"{where} gives layer_types={names!r}; it must name one of {', '.join(kinds)} for each of "
            f"{config['num_hidden_layers']} layers"
        )
    return [name == "sliding_attention" for name in names]


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


def read_rope(config: Mapping[str, Any], model_dir: Path, partial_rotary: bool = False) -> RopeConfig:
    """The rotary embedding of `config`, of its layers with full attention where there are two.

    Raises:
        UserError: a kind that is not known, or numbers it cannot have.
    """
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "full_attention" in scaling:
        scaling = dict(scaling["full_attention"] or {})
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    if kind == "su" or (partial_rotary and kind == "yarn"):  # LongRoPE's names in the first Phi-3 files
        kind = "longrope"
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
    partial = scaling.pop("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0 and not (partial_rotary and isinstance(partial, float) and 0 < partial < 1):
        allowed = "it must be above 0 and at most 1" if partial_rotary else "which is not supported; it must be 1.0"
        raise UserError(f"{model_dir / 'config.json'} sets partial_rotary_factor={partial!r}, {allowed}")
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    if int(head_dim * partial) % 2 or int(head_dim * partial) < 2:
        raise UserError(
            f"{model_dir / 'config.json'} sets partial_rotary_factor={partial!r}: it rotates {head_dim * partial:g} of a head's "
            f"{head_dim} dimensions; they must be a whole, even number"
        )
    if kind in ("llama3", "yarn"):
        scaling.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    if kind == "longrope":
        _complete_longrope(scaling, config, partial, model_dir / "config.json")
    return RopeConfig(theta=float(theta), type=kind, scaling=scaling, partial=float(partial))


def _complete_longrope(scaling: dict[str, Any], config: Mapping[str, Any], partial: float, where: Path) -> None:
    """Fill in what older files say elsewhere, and check the factors."""
    original = config.get("original_max_position_embeddings", scaling.get("original_max_position_embeddings"))
    scaling["original_max_position_embeddings"] = original = original or config["max_position_embeddings"]
    scaling.setdefault("factor", config["max_position_embeddings"] / original)
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    count = int(head_dim * partial) // 2
    factors = scaling.get("short_factor")
    if not isinstance(factors, list) or len(factors) != count or not all(isinstance(f, (int, float)) for f in factors):
        raise UserError(
            f"{where} must give the rope type 'longrope' short_factor as a list of {count} numbers; take the model's original file"
        )


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


def _refuse_unsupported(config: Mapping[str, Any], model_dir: Path, family: FamilyConfig) -> None:
    """Refuse what would silently change the result."""
    where = model_dir / "config.json"
    activation = config.get("hidden_activation", config.get("hidden_act", family.activation))
    if activation != family.activation:
        raise UserError(f"{where} asks for the activation {activation!r}; known: {family.activation}")
    layer_types = set(config.get("layer_types") or ())
    asked = (config.get("use_sliding_window") and config.get("sliding_window")) or layer_types - {"full_attention"}
    if asked and not family.windows:
        raise UserError(
            f"{where} asks for sliding-window attention, which is not supported; set use_sliding_window to false"
        )
