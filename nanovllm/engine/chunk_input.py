"""A step with prefill chunks as one flat array, so that one copy brings it to the device: of exact size, or padded to that of a CUDA graph.

Numpy makes it from a `ModelInput`, `ChunkInput` are its parts on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from nanovllm.engine.model_input import ModelInput

Ints = npt.NDArray[np.int64]


class ChunkShape(NamedTuple):
    """Sizes of a step: D decodes, then P tokens of chunks, N tiles of attention, S sequences that sample."""

    decodes: int
    tokens: int
    tiles: int
    samples: int

    @property
    def size(self) -> int:
        """Numbers in the flat array."""
        return self.decodes + 3 * self.tokens + 4 * self.tiles + 3 * self.samples


class ChunkInput(NamedTuple):
    """The parts of the array.

    Attributes:
        decode_slots: [D] state slots, the padding slot after the last.
        token_ids, positions, token_slots: [P] of the chunks' tokens; where padded, position -1 and the padding slot.
        tiles: [N, 4] int32 of the attention backend.
        last_rows, slots, lens: [S] of what samples: row of the step, state slot, tokens in the cache; where padded, length 0.
    """

    decode_slots: torch.Tensor
    token_ids: torch.Tensor
    positions: torch.Tensor
    token_slots: torch.Tensor
    tiles: torch.Tensor
    last_rows: torch.Tensor
    slots: torch.Tensor
    lens: torch.Tensor

    @classmethod
    def of(cls, array: torch.Tensor, shape: ChunkShape) -> ChunkInput:
        """The parts of `array` [shape.size], int64, on the device."""
        d, p, n, s = shape
        decode_slots, token_ids, positions, token_slots, tiles, *samples = array.split([d, p, p, p, 4 * n, s, s, s])
        last_rows, slots, lens = samples
        return cls(decode_slots, token_ids, positions, token_slots, tiles.view(n, 4).int(), last_rows, slots, lens)


class ChunkStep(NamedTuple):
    """The host's side of a step: lengths of its C chunks, which backends plan with, and what `pack` writes.

    Attributes:
        chunk_slots, chunk_query_lens, chunk_lens: [C] as in `AttentionBatch`.
        positions, token_slots: [P]; last_rows, sample_slots, sample_lens: [S].
    """

    step: ModelInput
    chunk_slots: Ints
    chunk_query_lens: Ints
    chunk_lens: Ints
    positions: Ints
    token_slots: Ints
    last_rows: Ints
    sample_slots: Ints
    sample_lens: Ints

    @classmethod
    def of(cls, step: ModelInput) -> ChunkStep:
        """From what the engine sent."""
        decodes, rows = step.num_decodes, step.sample_rows
        query_lens, lens = np.array(step.query_lens), np.array(step.context_lens)
        slots, chunk_query_lens, chunk_lens = step.slots[decodes:], query_lens[decodes:], lens[decodes:]
        first_rows = np.cumsum(chunk_query_lens) - chunk_query_lens
        shift = np.repeat(chunk_lens - chunk_query_lens - first_rows, chunk_query_lens)
        return cls(
            step,
            slots,
            chunk_query_lens,
            chunk_lens,
            np.arange(len(step.token_ids)) + shift,
            np.repeat(slots, chunk_query_lens),
            (np.cumsum(query_lens) - 1)[rows],
            step.slots[rows],
            lens[rows],
        )

    def pack(self, shape: ChunkShape, tiles: npt.NDArray[np.int32], padding_slot: int) -> Ints:
        """The flat array [shape.size], padded where this step is smaller than `shape`.

        Args:
            tiles: [n, 4] of the chunks, with rows counted from the first chunk's first token.
        """
        d, p, n, s = shape
        array = np.zeros(shape.size, dtype=np.int64)
        decode_slots, token_ids, positions, token_slots, packed_tiles, last_rows, slots, lens = np.split(
            array, np.cumsum([d, p, p, p, 4 * n, s, s])
        )
        decodes, tokens, samples = self.step.num_decodes, len(self.positions), len(self.last_rows)
        decode_slots[:decodes], decode_slots[decodes:] = self.step.slots[:decodes], padding_slot
        token_ids[:tokens] = self.step.token_ids
        positions[:tokens], positions[tokens:] = self.positions, -1
        token_slots[:tokens], token_slots[tokens:] = self.token_slots, padding_slot
        moved = tiles.astype(np.int64)
        moved[:, 1] += d
        packed_tiles[: moved.size] = moved.ravel()
        # Rows of chunks come after the padded decodes'.
        last_rows[:samples] = np.where(self.last_rows < decodes, self.last_rows, self.last_rows + d - decodes)
        slots[:samples], slots[samples:] = self.sample_slots, padding_slot
        lens[:samples] = self.sample_lens
        return array
