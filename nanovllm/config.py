"""Every knob of the engine, checked once. `LLM`, `AsyncLLM` and the pipelines all build an `EngineConfig`; no torch here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from nanovllm.utils.validation import parse


class EngineConfig(BaseModel):
    """Options of one engine. `EngineConfig.create(model, **options)` reports mistakes as a one-line `UserError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, protected_namespaces=())

    model: str = Field(description="Local directory with config.json and safetensors, or a hub id.")
    max_num_batched_tokens: int = Field(
        16384, ge=1, description="Tokens of one step, prefill chunks and decodes together."
    )
    max_num_seqs: int = Field(512, ge=1, description="Sequences that run at the same time.")
    max_model_len: int = Field(
        4096, ge=2, description="Longest prompt plus output in tokens; lowered to what the model's positions allow."
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Fraction of the GPU's memory this engine may use."
    )
    tensor_parallel_size: int = Field(1, ge=1, description="Ranks that share one copy of the model.")
    enable_expert_parallel: bool = Field(
        False, description="Ranks share a mixture's experts, each whole on one rank, not the features of every expert."
    )
    enforce_eager: bool = Field(False, description="Run without CUDA graphs.")
    kvcache_block_size: int = Field(64, description="Tokens of one KV cache block: a power of two from 16 to 256.")
    async_scheduling: bool = Field(
        True, description="Launch each step before the tokens of the one before are read; off: one after the other."
    )
    num_kvcache_blocks: int = Field(-1, description="KV cache blocks; -1 sizes the pool from free memory.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="auto: the checkpoint's type on a GPU, float32 on a CPU."
    )
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto: a GPU where there is one.")
    attention_backend: Literal["auto", "flash", "triton", "torch"] = Field(
        "auto", description="Attention implementation."
    )
    load_format: Literal["auto", "dummy"] = Field("auto", description="dummy: random weights of the config's shapes.")
    enable_prefix_caching: bool = Field(True, description="Reuse the KV of equal prompt prefixes, block by block.")
    shared_prefix_attention: bool = Field(
        True,
        description="Attend once to the cached prefix that many sequences share, where that saves reading; only the attention backend "
        "triton has it.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seeds requests that bring no seed of their own.")
    reasoning: bool = Field(
        False,
        description="The model thinks before it answers, between <think> and </think>: outputs come in two parts, and structured "
        "outputs begin after the thinking.",
    )
    quantization: Literal["fp8"] | None = Field(
        None,
        description="fp8: round the weights of a checkpoint that is not quantized to 8-bit floats as it is loaded, each output feature "
        "with a scale of its own. Quantized checkpoints say themselves how to read them.",
    )
    kv_cache_dtype: Literal["auto", "fp8"] = Field(
        "auto",
        description="Type of the KV cache. auto: the model's; fp8: eight bits (e4m3) with a scale for each token and head, about "
        "twice the tokens in the same memory and half the reading, for a GPU of compute capability 8.9 or more, or a CPU.",
    )
    lora_adapters: dict[str, str] = Field(
        default_factory=dict,
        description="Low-rank adapters in PEFT's format: name -> directory or hub id. A request names one by `lora_adapter`.",
    )
    trust_remote_code: bool = Field(False, description="Let the tokenizer run Python code from the model directory.")

    @field_validator("kvcache_block_size")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value not in (16, 32, 64, 128, 256):
            raise ValueError("must be a power of two from 16 to 256; use 16, 32, 64, 128 or 256")
        return value

    @field_validator("num_kvcache_blocks")
    @classmethod
    def _blocks(cls, value: int) -> int:
        if value != -1 and value < 1:
            raise ValueError("must be at least 1, or -1 to size the pool from free memory")
        return value

    @model_validator(mode="after")
    def _readable_cache(self) -> EngineConfig:
        if self.kv_cache_dtype == "fp8" and self.attention_backend == "flash":
            raise ValueError(
                "attention_backend='flash' does not read kv_cache_dtype='fp8'; use attention_backend=auto, or kv_cache_dtype=auto"
            )
        return self

    @property
    def shares_prefixes(self) -> bool:
        """Whether decodes may attend once to what they share: only what is cached is shared."""
        return self.shared_prefix_attention and self.enable_prefix_caching

    @classmethod
    def create(cls, model: str, **options: Any) -> EngineConfig:
        """Check `options` and build the configuration.

        Raises:
            UserError: an unknown option (the nearest known one is named) or a value out of range.
        """
        return parse(cls, {"model": str(model), **options}, "engine option")
