"""Tiny random models on disk, with real `config.json` keys and checkpoint names: what every test of the engine runs on.

`make_model(path, "qwen3", num_key_value_heads=1)` writes config.json, generation_config.json and safetensors, and with
`tokenizer=True` a byte-level BPE tokenizer with a ChatML template. The same arguments always write the same weights.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

# On a machine with a single GPU two ranks have nowhere to run.
TWO_RANKS = not torch.cuda.is_available() or torch.cuda.device_count() >= 2
needs_two_ranks = pytest.mark.skipif(not TWO_RANKS, reason="needs two GPUs, or none")

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)

_BASE: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
}
# What the published configs of each family say beside their sizes.
_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 16,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 2,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 2,
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "mlp_bias": False,
        "pretraining_tp": 1,
    },
    "granite": {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "mlp_bias": False,
        "embedding_multiplier": 1.5,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.4,
        "logits_scaling": 4.0,
    },
    "smollm3": {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 0],
        "use_sliding_window": False,
        "sliding_window": None,
        "pad_token_id": 0,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "original_max_position_embeddings": 512,
        "sliding_window": None,
        "pad_token_id": 0,
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": None,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "moe_intermediate_size": 20,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
        "use_sliding_window": False,
        "sliding_window": None,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "head_dim": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 9,
        "sliding_window": 24,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 3.0,
        "pad_token_id": 0,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 9,
        "sliding_window": 20,
        "sliding_window_pattern": 3,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "pad_token_id": 0,
    },
}
# Qwen2 has no such key: its query, key and value projections always have a bias; Mistral and Mixtral never have one.
_WITHOUT = dict.fromkeys(("qwen2", "mistral", "mixtral", "phi3"), ("attention_bias",))


def make_config(
    family: str = "qwen3", *, form: str = "4.x", dtype: str = "float32", **overrides: Any
) -> dict[str, Any]:
    """A config.json as transformers `form` ("4.x" or "5.x") writes it. Overrides are given with 4.x names."""
    config = {**_BASE, **_FAMILIES[family], "eos_token_id": None, **overrides}
    for key in _WITHOUT.get(family, ()):
        config.pop(key, None)
    if family == "gemma3":
        config.pop("hidden_act")
    if form == "4.x":
        return {**config, "rope_scaling": config.get("rope_scaling"), "torch_dtype": dtype}
    if family == "gemma3":
        config["rope_parameters"] = {
            "full_attention": {
                **(config.pop("rope_scaling", None) or {"rope_type": "default"}),
                "rope_theta": config.pop("rope_theta"),
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": config.pop("rope_local_base_freq")},
        }
        pattern, count = config.pop("sliding_window_pattern"), config["num_hidden_layers"]
        kinds = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(count)]
        return {**config, "layer_types": kinds, "dtype": dtype}
    rope = config.pop("rope_scaling", None) or {"rope_type": "default"}
    rope = {**rope, "rope_theta": config.pop("rope_theta")}
    return {**config, "rope_parameters": rope, "dtype": dtype}


def make_model(
    path: Path | str,
    family: str = "qwen3",
    *,
    seed: int = 0,
    tokenizer: bool = False,
    form: str = "4.x",
    dtype: str = "float32",
    shards: int = 1,
    generation_config: dict[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Write a random model of `family` (a key of `_FAMILIES`) to the directory `path` and return it.

    Args:
        seed: of the weights.
        tokenizer: also write a tokenizer; the vocabulary is then its size (unless overridden), EOS is <|im_end|>.
        form: keys of config.json as transformers "4.x" or "5.x" writes them.
        dtype: type of the stored weights.
        shards: files the weights are spread over; more than one comes with an index.
        generation_config: content of generation_config.json, which is not written when None.
        overrides: config.json keys under their 4.x names.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        write_tokenizer(path)
        sizes = {"vocab_size": len(_tokenizer().get_vocab()), "eos_token_id": _tokenizer().token_to_id(IM_END)}
        overrides = {**sizes, **overrides}
    config = make_config(family, form=form, dtype=dtype, **overrides)
    (path / "config.json").write_text(json.dumps(config, indent=1))
    if generation_config is not None:
        (path / "generation_config.json").write_text(json.dumps(generation_config))
    tensors = make_weights(config, seed, getattr(torch, dtype))
    write_weights(path, tensors, shards)
    return path


def make_weights(config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random tensors under their checkpoint names.

    Weights are large enough that attention decides the next token and the best logit stands clear of rounding.
    """
    family, hidden, inner = config["model_type"], config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    biased = config.get("attention_bias", False)
    qkv_bias, mlp_bias = biased or family == "qwen2", config.get("mlp_bias", False)
    gemma = family.startswith("gemma")  # its norms hold the weight less one
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}

    def normal(name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        tensors[name] = (torch.randn(*shape, generator=generator) * std + mean).to(dtype)

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        normal(f"{name}.weight", rows, columns, std=1.5 / math.sqrt(columns))
        if bias:
            normal(f"{name}.bias", rows, std=0.3)

    # Gemma scales the embedding, by the root of its size.
    normal("model.embed_tokens.weight", config["vocab_size"], hidden, std=0.3 / hidden ** (gemma / 2))
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for projection, rows in (("q", q), ("k", kv), ("v", kv)):
            linear(f"{layer}.self_attn.{projection}_proj", rows, hidden, qkv_bias)
        linear(f"{layer}.self_attn.o_proj", hidden, q, biased)
        if family in ("qwen3", "qwen3_moe", "gemma3_text"):
            normal(f"{layer}.self_attn.q_norm.weight", head_dim, std=0.2, mean=1.5 - gemma)
            normal(f"{layer}.self_attn.k_norm.weight", head_dim, std=0.2, mean=1.5 - gemma)
        block, size, names = "mlp", inner, ("gate_proj", "up_proj", "down_proj")
        experts = [""]
        if family == "mixtral":
            block, names = "block_sparse_moe", ("w1", "w3", "w2")
            experts = [f"experts.{e}." for e in range(config["num_local_experts"])]
        elif family == "qwen3_moe" and i not in config["mlp_only_layers"]:
            size, experts = config["moe_intermediate_size"], [f"experts.{e}." for e in range(config["num_experts"])]
        if len(experts) > 1:
            normal(f"{layer}.{block}.gate.weight", len(experts), hidden, std=0.5)
        for expert in experts:
            for name, rows, columns in zip(names, (size, size, hidden), (hidden, hidden, size), strict=True):
                linear(f"{layer}.{block}.{expert}{name}", rows, columns, mlp_bias)
        norms = ["input", "post_attention"] + ["pre_feedforward", "post_feedforward"] * gemma
        for norm in norms:
            normal(f"{layer}.{norm}_layernorm.weight", hidden, std=0.1, mean=1.0 - gemma)
    normal("model.norm.weight", hidden, std=0.1, mean=1.0 - gemma)
    if family == "phi3":
        _fuse(tensors)
    if not config.get("tie_word_embeddings"):
        normal("lm_head.weight", config["vocab_size"], hidden, std=0.5)
    return tensors


def _fuse(tensors: dict[str, torch.Tensor]) -> None:
    """As Phi-3's checkpoints hold them: query, key and value in one tensor, gate and up in another."""
    for parts, fused in ((("q_proj", "k_proj", "v_proj"), "qkv_proj"), (("gate_proj", "up_proj"), "gate_up_proj")):
        for first in [name for name in tensors if f".{parts[0]}." in name]:
            pieces = [tensors.pop(first.replace(parts[0], part)) for part in parts]
            tensors[first.replace(parts[0], fused)] = torch.cat(pieces)


def write_weights(path: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Write `tensors` as one safetensors file, or as several with an index."""
    if shards == 1:
        save_file(tensors, str(path / "model.safetensors"), metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, str(path / file), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@cache
def _tokenizer() -> Any:
    """Byte-level BPE of 259 + 40 or so tokens: any text can be encoded, and any bytes can come out of a random model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the quick brown fox jumps over the lazy dog and then there is the other thing, user assistant system\n"
    tokenizer.train_from_iterator([text] * 4, trainer)
    return tokenizer


def write_tokenizer(path: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, as a Qwen model has them."""
    _tokenizer().save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
