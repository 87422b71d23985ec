"""One step's work as flat arrays, made by the engine and sent to every rank. Numpy only, so it travels cheaply."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nanovllm.engine.scheduler import ScheduledSequence

Ints = npt.NDArray[np.int64]


class ModelInput(NamedTuple):
    """T new tokens of B sequences, ordered by `order_batch`; S of the sequences sample.

    Attributes:
        token_ids, positions, slot_mapping: [T] of the new tokens.
        num_decodes: leading sequences with one new token.
        query_lens, context_lens: new tokens, and all tokens in the cache after the step, of each sequence.
        block_tables: [B, W] block ids, padded with 0.
        sample_rows: [S] rows of the T tokens whose logits are sampled.
        temperatures, seeds, sample_steps: [S] sampling inputs, see `layers.sampler`.
    """

    token_ids: Ints
    positions: Ints
    slot_mapping: Ints
    num_decodes: int
    query_lens: list[int]
    context_lens: list[int]
    block_tables: Ints
    sample_rows: Ints
    temperatures: npt.NDArray[np.float32]
    seeds: Ints
    sample_steps: Ints


def order_batch(batch: list[ScheduledSequence]) -> list[ScheduledSequence]:
    """Sequences with one new token first, the longest context first among them; prefill chunks keep their order."""
    return sorted(batch, key=lambda item: -item.start if item.num_tokens == 1 else 1)


def build_model_input(batch: list[ScheduledSequence], block_size: int) -> ModelInput:
    """Flatten an ordered `batch`."""
    query_lens = [item.num_tokens for item in batch]
    context_lens = [item.start + item.num_tokens for item in batch]
    block_tables = np.zeros((len(batch), max(len(item.seq.block_table) for item in batch)), dtype=np.int64)
    token_ids: list[int] = []
    for row, item in enumerate(batch):
        token_ids.extend(item.seq.token_ids[item.start : item.start + item.num_tokens])
        block_tables[row, : len(item.seq.block_table)] = item.seq.block_table
    ends: Ints = np.cumsum(query_lens, dtype=np.int64)
    rows: Ints = np.repeat(np.arange(len(batch), dtype=np.int64), query_lens)
    starts = np.array([item.start for item in batch], dtype=np.int64)
    positions: Ints = (
        np.arange(len(token_ids), dtype=np.int64) - (ends - np.array(query_lens, dtype=np.int64))[rows] + starts[rows]
    )
    slots = block_tables[rows, positions // block_size] * block_size + positions % block_size
    sampling = [(end - 1, item.seq) for end, item in zip(ends.tolist(), batch, strict=True) if item.samples]
    return ModelInput(
        token_ids=np.array(token_ids, dtype=np.int64),
        positions=positions,
        slot_mapping=slots,
        num_decodes=sum(length == 1 for length in query_lens),
        query_lens=query_lens,
        context_lens=context_lens,
        block_tables=block_tables,
        sample_rows=np.array([row for row, _ in sampling], dtype=np.int64),
        temperatures=np.array([seq.params.temperature for _, seq in sampling], dtype=np.float32),
        seeds=np.array([seq.seed for _, seq in sampling], dtype=np.int64),
        sample_steps=np.array([seq.num_generated_tokens for _, seq in sampling], dtype=np.int64),
    )
