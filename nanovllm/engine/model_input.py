"""One step's work as flat arrays, made by the engine and sent to every rank. Numpy only, so it travels cheaply.

It holds only what the device cannot know: which sequences run, the tokens of prefill chunks, new blocks. Where a decode stands is
in the device's own state (`engine.device_state`).
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nanovllm.engine.scheduler import ScheduledSequence
from nanovllm.engine.sequence import TOKEN
from nanovllm.utils.prefixes import SharedPrefixes

Ints = npt.NDArray[np.int64]


class ModelInput(NamedTuple):
    """Work of B sequences, ordered by `order_batch`: D decodes, then prefill chunks with P tokens in all.

    Attributes:
        num_decodes: D, leading sequences with one new token, which the device's state knows; all of them sample.
        slots: [B] state slot of each sequence.
        query_lens, context_lens: new tokens, and all tokens in the cache after the step, of each sequence.
        token_ids: [P] tokens of the prefill chunks.
        sample_rows: [S] sequences (indices into B) that sample: the decodes, and the chunks that end their prompt.
        new_blocks: [3, U] slot, column and block id of block table entries to write first.
        new_sequences: [5, N] slot, token, position, tokens generated before and seed of sequences that begin to sample;
            token and position count only for decodes. new_temperatures: [N] theirs.
        new_adapters: [2, A] slot and adapter (-1: none) of sequences that begin to run, where the engine has adapters.
        adapted: some sequence has an adapter.
        shares: its decodes share prefixes, which are attended once; shared: what they share, where that is not as in the step before.
        extended: a `SamplingInput` follows, without which nothing is sampled.
    """

    num_decodes: int
    slots: Ints
    query_lens: list[int]
    context_lens: list[int]
    token_ids: Ints
    sample_rows: Ints
    new_blocks: Ints
    new_sequences: Ints
    new_temperatures: npt.NDArray[np.float32]
    new_adapters: Ints = np.zeros((2, 0), dtype=np.int64)
    adapted: bool = False
    shares: bool = False
    shared: SharedPrefixes | None = None
    extended: bool = False


def is_decode(item: ScheduledSequence) -> bool:
    """Whether the step's only token of the sequence is its last: all its state can be on the device."""
    return item.num_tokens == 1 and item.samples


def order_batch(batch: list[ScheduledSequence]) -> list[ScheduledSequence]:
    """Decodes first, the longest context first among them; prefill chunks keep their order."""
    return sorted(batch, key=lambda item: -item.start if is_decode(item) else 1)


def build_model_input(batch: list[ScheduledSequence], extended: bool = False, has_adapters: bool = False) -> ModelInput:
    """Flatten an ordered `batch`. Notes in each sequence what the device has been told of it."""
    num_decodes = sum(map(is_decode, batch))
    token_ids = array(TOKEN)
    for item in batch[num_decodes:]:
        token_ids.extend(item.seq.token_ids[item.start : item.start + item.num_tokens])
    new_blocks: list[tuple[int, int, int]] = []
    new_sequences: list[tuple[int, int, int, int, int]] = []
    temperatures: list[float] = []
    adapters: list[tuple[int, int]] = []
    for item in batch:
        seq = item.seq
        table = seq.block_table
        if has_adapters and not seq.num_sent_blocks:
            adapters.append((seq.slot, seq.adapter))
        if len(table) > seq.num_sent_blocks:
            new_blocks += [(seq.slot, column, table[column]) for column in range(seq.num_sent_blocks, len(table))]
            seq.num_sent_blocks = len(table)
        if item.samples and not seq.on_device:
            seq.on_device = True
            known = seq.token_ids[-1]
            new_sequences.append((seq.slot, known, item.start, seq.num_generated_tokens, seq.seed))
            temperatures.append(seq.params.temperature)
    return ModelInput(
        num_decodes=num_decodes,
        slots=np.array([item.seq.slot for item in batch], dtype=np.int64),
        query_lens=[item.num_tokens for item in batch],
        context_lens=[item.start + item.num_tokens for item in batch],
        token_ids=np.array(token_ids, dtype=np.int64),
        sample_rows=np.array([row for row, item in enumerate(batch) if item.samples], dtype=np.int64),
        new_blocks=np.array(new_blocks, dtype=np.int64).reshape(-1, 3).T,
        new_sequences=np.array(new_sequences, dtype=np.int64).reshape(-1, 5).T,
        new_temperatures=np.array(temperatures, dtype=np.float32),
        new_adapters=np.array(adapters, dtype=np.int64).reshape(-1, 2).T,
        adapted=has_adapters and any(item.seq.adapter >= 0 for item in batch),
        extended=extended,
    )
