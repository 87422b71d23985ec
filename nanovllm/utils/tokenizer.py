"""Finds the model's tokenizer, or None for a directory that has none (random weights for benchmarks, token-id prompts); encodes many texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nanovllm.config import EngineConfig
from nanovllm.errors import UserError
from nanovllm.utils.hub import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_tokenizer(config: EngineConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the model's directory.

    Raises:
        UserError: there are tokenizer files and they cannot be loaded.
    """
    model_dir = resolve_model(config.model)
    if not any((model_dir / name).is_file() for name in _FILES):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(model_dir), trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # transformers raises many kinds for broken files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"the tokenizer in {model_dir} cannot be loaded: {reason}") from None
    return tokenizer


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], add_special_tokens: bool = True
) -> list[list[int]]:
    """Token ids of each text, as `tokenizer.encode` gives them one by one. A fast tokenizer uses all cores, and not Python's lock.

    Raises:
        Exception: of the tokenizer's own kinds, for all where it refuses one.
    """
    if not texts:
        return []
    found: list[list[int]] = tokenizer(
        list(texts),
        add_special_tokens=add_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    return found
