"""Everything about a model that can be refused before an engine loads: called by engines, and by the pipeline's driver."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from nanovllm.config import EngineConfig
from nanovllm.errors import UserError
from nanovllm.models.config import ModelConfig
from nanovllm.models.registry import ARCHITECTURES
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.hub import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Options that a model's tokenizer or vocabulary may rule out.
MODEL_OPTIONS = ("structured_outputs", "labels", "allowed_token_ids", "logit_bias", "bad_words", "stop", "lora_adapter")


def check_model(config: EngineConfig) -> ModelConfig:
    """Check model files and shapes against `config` in a few seconds, reading headers only; needs no GPU.

    Raises:
        UserError: one line about the first thing that would keep the engine from starting.
    """
    model_dir = resolve_model(config.model)
    model_config = ModelConfig.from_dir(model_dir, ARCHITECTURES)
    if config.enable_expert_parallel:
        if model_config.moe is None:
            raise UserError(
                f"enable_expert_parallel=True: {config.model} ({model_config.architecture}) has no experts; leave it out"
            )
        model_config = dataclasses.replace(model_config, moe=model_config.moe._replace(parallel=True))
    stored = model_config.quantization
    if config.quantization is not None and stored is not None and not stored.is_fp8:
        raise UserError(
            f"quantization={config.quantization!r}: {config.model} is quantized already ({stored.method}), which cannot be turned into "
            "another form; leave the option out"
        )
    check_tensor_parallel(model_config, config.tensor_parallel_size)
    if config.load_format == "auto" or config.lora_adapters:
        import torch

        from nanovllm.layers.backends.torch_backend import TorchBackend
        from nanovllm.layers.parallel import TensorParallel
        from nanovllm.utils.adapters import read_adapters
        from nanovllm.utils.loader import check_checkpoint, checkpoint_files

        if config.load_format == "auto":
            checkpoint_files(model_dir)
        with torch.device("meta"):
            model_class = ARCHITECTURES[model_config.architecture].load()
            model = model_class(model_config, TensorParallel(), TorchBackend(1, 1, 1), max_position=1)
        if config.load_format == "auto":
            check_checkpoint(model_dir, model, model_config.quantization)
        read_adapters(config.lora_adapters, model)
    return model_config


def check_sampling(
    config: EngineConfig,
    params: SamplingParams,
    model: ModelConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Refuse what every request with `params` would be refused for: a structured output that cannot be compiled, labels of
    the same tokens, token ids that the model lacks.

    Args:
        config: of the engine.
        params: with no `problem()`.
        model, tokenizer: of the model where the caller has them; they are loaded where not and where `params` need them.

    Raises:
        UserError: one line that says why.
    """
    if all(getattr(params, name) is None for name in MODEL_OPTIONS):
        return
    from nanovllm.engine.request_maker import RequestMaker
    from nanovllm.utils.tokenizer import load_tokenizer

    model = model or ModelConfig.from_dir(resolve_model(config.model), ARCHITECTURES)
    tokenizer = tokenizer or load_tokenizer(config)
    blocks = -(-config.max_model_len // config.kvcache_block_size)
    maker = RequestMaker(config, model, tokenizer, config.max_model_len, blocks)
    # Whether a budget for thinking has anything to limit is told by a row's prompt.
    made = maker.make([0], dataclasses.replace(params, thinking_budget=None, n=1))
    if isinstance(made, dict) and made["error"] is not None:
        raise UserError(f"sampling: {made['error']}")


def check_tensor_parallel(model: ModelConfig, size: int) -> None:
    """Refuse a rank count that does not divide the model's heads and widths.

    Raises:
        UserError: naming the number that does not divide.
    """
    numbers = {"attention heads": model.num_heads}
    if not all(layer.sparse for layer in model.layers):
        numbers["feed-forward features"] = model.intermediate_size
    if model.moe is not None and model.moe.parallel:
        numbers["experts"] = model.moe.num_experts
    elif model.moe is not None:
        numbers["features of an expert"] = model.moe.intermediate_size
    for what, number in numbers.items():
        if number % size:
            raise UserError(
                f"tensor_parallel_size={size} does not divide the model's {number} {what}; use {_divisors(*numbers.values())}"
            )
    if model.num_kv_heads % size and size % model.num_kv_heads:
        raise UserError(
            f"tensor_parallel_size={size} neither divides the model's {model.num_kv_heads} KV heads nor is a multiple of them"
        )


def _divisors(*numbers: int) -> str:
    return ", ".join(
        str(n) for n in range(1, min(numbers) + 1) if all(number % n == 0 for number in numbers) and n <= 64
    )
