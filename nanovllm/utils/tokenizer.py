"""Finds the model's tokenizer, or None for a directory that has none (random weights for benchmarks, token-id prompts); encodes many texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

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
    if (encode := _compiled(tokenizer)) is None:
        return _call(tokenizer, texts, add_special_tokens)
    _call(tokenizer, ["a"], add_special_tokens)  # tells the compiled half how to go about it
    return [encoding.ids for encoding in encode(list(texts), add_special_tokens=add_special_tokens)]


def _call(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
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


# What a tokenizer's class may do itself with texts, by the names of transformers 4 and 5.
_OWN = ("__call__", "_call_one", "_encode_plus", "_batch_encode_plus", "batch_encode_plus")


def _compiled(tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[Any]] | None:
    """What encodes texts in the compiled half alone, in half of this thread's time; None where there is more to it, or no such half."""
    from transformers import PreTrainedTokenizerFast

    own = any(getattr(type(tokenizer), name, None) is not getattr(PreTrainedTokenizerFast, name, None) for name in _OWN)
    if own or not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    encode: Callable[..., list[Any]] = tokenizer.backend_tokenizer.encode_batch_fast
    return encode
