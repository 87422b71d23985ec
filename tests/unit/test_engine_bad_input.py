"""Models and options that cannot work: refused within seconds, in one line that says what and how to mend it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, EngineConfig, UserError
from nanovllm.preflight import check_model
from tests.models import make_config, make_model, make_weights, write_weights

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def refusal(model: Path | str, **options: Any) -> str:
    """The line the engine refuses `model` with; the check before any engine loads must say the same."""
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        LLM(str(model), **options)
    assert time.monotonic() - start < 15
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) > 20
    return line


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_num_seq": 4}, "unknown engine option 'max_num_seq': did you mean 'max_num_seqs'?"),
        ({"tensor_parallel": 2}, "did you mean 'tensor_parallel_size'?"),
        ({"xyzzy": 2}, "known: "),
        ({"kvcache_block_size": 100}, "kvcache_block_size=100: must be a power of two from 16 to 256"),
        ({"kvcache_block_size": 8}, "kvcache_block_size=8"),
        ({"kvcache_block_size": 512}, "kvcache_block_size=512"),
        ({"num_kvcache_blocks": 0}, "num_kvcache_blocks=0"),
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens=0"),
        ({"max_model_len": 1}, "max_model_len=1"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization=1.5"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"seed": -1}, "seed=-1"),
        ({"load_format": "gguf"}, "load_format='gguf'"),
        ({"max_num_seqs": "many"}, "max_num_seqs='many'"),
    ],
)
def test_options(model_dir: Path, options: dict[str, Any], expected: str) -> None:
    assert expected in refusal(model_dir, **options)


@NO_GPU
def test_gpu_where_there_is_none(model_dir: Path) -> None:
    line = refusal(model_dir, device="cuda")
    assert "device='cuda'" in line
    assert "0 are visible" in line
    assert "device=cpu" in line


@NO_GPU
@pytest.mark.parametrize("backend", ["triton", "flash"])
def test_attention_backend_that_is_not_available(
    model_dir: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    line = refusal(model_dir, attention_backend=backend)
    assert f"attention_backend={backend!r}" in line
    assert "torch" in line


@NO_GPU
def test_gpus_for_two_ranks_where_there_are_none(model_dir: Path) -> None:
    assert "device='cuda'" in refusal(model_dir, device="cuda", tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("family", "options", "size", "expected"),
    [
        ("qwen3", {"num_attention_heads": 6}, 4, "does not divide the model's 6 attention heads; use 1, 2"),
        ("llama", {"intermediate_size": 90}, 4, "does not divide the model's 90 feed-forward features"),
        (
            "qwen2",
            {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3},
            2,
            "neither divides the model's 3 KV heads nor is a multiple",
        ),
    ],
)
def test_tensor_parallel_that_does_not_divide(
    tmp_path: Path, family: str, options: dict[str, Any], size: int, expected: str
) -> None:
    assert expected in refusal(make_model(tmp_path, family, **options), tensor_parallel_size=size)


def test_directory_that_does_not_exist(tmp_path: Path) -> None:
    line = refusal(tmp_path / "nowhere")
    assert "does not exist" in line
    assert str(tmp_path / "nowhere") in line


def test_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert "'nobody/no-such-model-at-all' is no local directory" in refusal("nobody/no-such-model-at-all")


def test_file_instead_of_a_directory(model_dir: Path) -> None:
    assert "is a file; give the directory" in refusal(model_dir / "config.json")


def test_directory_without_config(tmp_path: Path) -> None:
    assert "config.json does not exist" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["{", "", "[1]", "\x00\xff", '{"architectures": 5}', '"text"'])
def test_config_that_is_no_json_object(tmp_path: Path, content: str) -> None:
    path = make_model(tmp_path)
    (path / "config.json").write_bytes(content.encode("latin-1"))
    assert "config.json" in refusal(path)


def test_generation_config_that_is_no_json(tmp_path: Path) -> None:
    path = make_model(tmp_path)
    (path / "generation_config.json").write_text("{'eos_token_id': 1}")
    assert "generation_config.json" in refusal(path)


def edited(path: Path, **changes: Any) -> Path:
    """A model whose config.json was changed after its weights were written; a change to ... removes the key."""
    config = json.loads((make_model(path) / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return path


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["BertModel"]}, ["BertModel", "Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM"]),
        ({"architectures": []}, ["none", "Qwen3ForCausalLM"]),
        ({"architectures": ...}, ["none", "Qwen3ForCausalLM"]),
        ({"hidden_size": ...}, ["lacks the key 'hidden_size'"]),
        ({"hidden_act": "gelu"}, ["'gelu'", "silu"]),
        ({"use_sliding_window": True, "sliding_window": -1}, ["sliding_window=-1", "1 or more"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["no window", "use_sliding_window"]),
        ({"layer_types": ["full_attention"]}, ["full_attention, sliding_attention", "2 layers"]),
        ({"layer_types": ["full_attention", "chunked_attention"]}, ["chunked_attention", "2 layers"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, ["'longrope'", "short_factor", "8 numbers"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["'dynamic'", "linear, llama3, yarn, longrope"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            ["'bitsandbytes'", "fp8, compressed-tensors, awq, gptq"],
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3, "group_size": 8}}, ["bits is 3", "4 or 8"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["lacks 'group_size'"]),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, ["'e5m2'", "'e4m3'"]),
        ({"quantization_config": {"quant_method": "awq", "group_size": 32, "version": "gemv"}}, ["'gemv'", "'gemm'"]),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}, "ignore": "lm_head"}},
            ["'lm_head' is no list"],
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, ["factor"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor"]),
        ({"rope_scaling": {"rope_type": "yarn"}}, ["factor"]),
        ({"hidden_size": "wide"}, ["hidden_size"]),
        ({"vocab_size": -3}, ["vocab_size"]),
        ({"num_attention_heads": 0}, ["num_attention_heads"]),
        ({"head_dim": 15}, ["head_dim"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads=3", "num_attention_heads=4"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, ["factor='two'"]),
    ],
)
def test_config_that_asks_for_what_is_not_there(tmp_path: Path, changes: dict[str, Any], expected: list[str]) -> None:
    line = refusal(edited(tmp_path, **changes))
    assert "config.json" in line
    for part in expected:
        assert part in line


def test_directory_without_weights(tmp_path: Path) -> None:
    path = make_model(tmp_path)
    (path / "model.safetensors").unlink()
    line = refusal(path)
    assert "no *.safetensors" in line
    assert "load_format=dummy" in line
    LLM(str(path), load_format="dummy", num_kvcache_blocks=1)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
def test_truncated_weights(tmp_path: Path, keep: float) -> None:
    file = make_model(tmp_path) / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    line = refusal(tmp_path)
    assert "truncated" in line
    assert str(file) in line


def test_weights_that_are_something_else(tmp_path: Path) -> None:
    (make_model(tmp_path) / "model.safetensors").write_text("<html>404 not found</html>" * 100)
    assert "not safetensors" in refusal(tmp_path)


Change = Callable[[dict[str, torch.Tensor]], Any]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "lacks the tensor model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.pop("lm_head.weight"), "lacks the tensor lm_head.weight"),
        (lambda t: t.update(extra=torch.zeros(2)), "holds the tensor extra, which Qwen3ForCausalLM"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
            "holds the tensor model.layers.0.self_attn.q_proj.bias",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.zeros(16, 48)}),
            "model.layers.0.self_attn.k_proj.weight has shape [16, 48], config.json asks for [32, 48]",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(47)}),
            "model.norm.weight has shape [47], config.json asks for [48]",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config(tmp_path: Path, change: Change, expected: str) -> None:
    tensors = make_weights(make_config())
    change(tensors)
    write_weights(make_model(tmp_path), tensors)
    assert expected in refusal(tmp_path)


@pytest.mark.parametrize(
    ("family", "change", "expected"),
    [
        (
            "qwen3_moe",
            lambda t: t.pop("model.layers.1.mlp.experts.5.up_proj.weight"),
            "lacks the tensor model.layers.1.mlp.experts.5.up_proj.weight",
        ),
        (
            "qwen3_moe",
            lambda t: t.update({"model.layers.0.mlp.experts.6.up_proj.weight": torch.zeros(20, 48)}),
            "holds the tensor model.layers.0.mlp.experts.6.up_proj.weight, which Qwen3MoeForCausalLM",
        ),
        (
            "qwen3_moe",
            lambda t: t.update({"model.layers.0.mlp.experts.3.down_proj.weight": torch.zeros(20, 48)}),
            "experts.3.down_proj.weight has shape [20, 48], config.json asks for [48, 20]",
        ),
        (
            "mixtral",
            lambda t: t.pop("model.layers.0.block_sparse_moe.gate.weight"),
            "lacks the tensor model.layers.0.block_sparse_moe.gate.weight",
        ),
        (
            "mixtral",
            lambda t: t.update({"model.layers.1.block_sparse_moe.experts.0.w2.weight": torch.zeros(88, 48)}),
            "block_sparse_moe.experts.0.w2.weight has shape [88, 48], config.json asks for [48, 88]",
        ),
        (
            "phi3",
            lambda t: t.update({"model.layers.0.self_attn.qkv_proj.weight": torch.zeros(90, 48)}),
            "self_attn.qkv_proj.weight has shape [90, 48], config.json asks for [96, 48]",
        ),
        (
            "phi3",
            lambda t: t.pop("model.layers.0.mlp.gate_up_proj.weight"),
            "lacks the tensor model.layers.0.mlp.gate_up_proj.weight",
        ),
    ],
)
def test_weights_of_experts_and_fused_ones_are_named(
    tmp_path: Path, family: str, change: Change, expected: str
) -> None:
    tensors = make_weights(make_config(family))
    change(tensors)
    write_weights(make_model(tmp_path, family), tensors)
    assert expected in refusal(tmp_path)


def test_ranks_that_experts_cannot_be_shared_by(tmp_path: Path, model_dir: Path) -> None:
    path = make_model(tmp_path, "qwen3_moe", num_experts=7, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    assert "7 experts" in refusal(path, tensor_parallel_size=2, enable_expert_parallel=True)
    assert "20 features of an expert" in refusal(path, tensor_parallel_size=8)
    line = refusal(model_dir, enable_expert_parallel=True)
    assert "enable_expert_parallel=True" in line and "Qwen3ForCausalLM) has no experts" in line


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("qwen3_moe", {"num_experts": 0}, "num_experts=0"),
        ("qwen3_moe", {"num_experts_per_tok": 7}, "num_experts_per_tok=7; there are 6 experts"),
        ("qwen3_moe", {"moe_intermediate_size": "wide"}, "moe_intermediate_size='wide'"),
        ("mixtral", {"num_local_experts": -1}, "num_local_experts=-1"),
        ("mistral", {"sliding_window": 2.5}, "sliding_window=2.5"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier=0"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers=[1]"),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5"),
        ("phi3", {"partial_rotary_factor": 0.3}, "rotates 3.6 of a head's 12 dimensions"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "short_factor as a list of 6 numbers"),
    ],
)
def test_configs_of_families_that_ask_for_the_impossible(
    tmp_path: Path, family: str, changes: dict[str, Any], expected: str
) -> None:
    path = make_model(tmp_path, family)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    assert expected in refusal(path)


def test_tied_models_may_carry_a_head_and_old_ones_their_frequencies(tmp_path: Path) -> None:
    """Written by some trainers; both are computed, so they change nothing."""
    path = make_model(tmp_path, tie_word_embeddings=True)
    tensors = make_weights(make_config(tie_word_embeddings=True))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    write_weights(path, tensors)
    LLM(str(path), num_kvcache_blocks=1)


def test_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    path = make_model(tmp_path, shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    assert "lacks the weight file model-00002-of-00003.safetensors" in refusal(path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_index_that_is_none(tmp_path: Path, content: str) -> None:
    path = make_model(tmp_path, shards=2)
    (path / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refusal(path)


def test_broken_tokenizer(tmp_path: Path) -> None:
    path = make_model(tmp_path, tokenizer=True)
    (path / "tokenizer.json").write_text('{"version": "1.0"')
    assert "tokenizer" in refusal(path)


def test_preflight_loads_no_weights_and_says_the_same(tmp_path: Path) -> None:
    path = make_model(tmp_path)
    assert check_model(EngineConfig.create(str(path))).vocab_size == 257
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-4])
    with pytest.raises(UserError) as caught:
        check_model(EngineConfig.create(str(path)))
    assert str(caught.value) == refusal(path)
