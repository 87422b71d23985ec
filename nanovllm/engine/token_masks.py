"""Masks over the vocabulary: rows of int32 words, in which bit `i % 32` of word `i // 32` is set where token `i` is allowed."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def mask_words(vocab_size: int) -> int:
    """Words of a mask."""
    return -(-vocab_size // 32)


def allow_only(mask: NDArray[np.int32], token_ids: Iterable[int]) -> None:
    """Write a mask that allows `token_ids` and nothing else."""
    ids = np.fromiter(token_ids, np.int64)
    words = mask.view(np.uint32)
    words[:] = 0
    np.bitwise_or.at(words, ids >> 5, np.uint32(1) << (ids & 31).astype(np.uint32))


def allow_all(mask: NDArray[np.int32], vocab_size: int) -> None:
    """Write a mask that allows every id below `vocab_size`."""
    words, rest = divmod(vocab_size, 32)
    mask[:words] = -1
    mask[words:] = 0
    if rest:
        mask[words] = (1 << rest) - 1
