"""What the device remembers of every running sequence between steps, so that a step can start before the host has read the last one.

A sequence keeps one slot from admission to its end. The host writes a slot when its sequence starts to decode and when a
block is added to it; everything else advances on the device.
"""

from __future__ import annotations

import torch

from nanovllm.engine.model_input import ModelInput
from nanovllm.kernels.decode_step import DecodeInputs, advance, advance_torch, gather_decode, gather_decode_torch
from nanovllm.kernels.triton_compat import use_triton
from nanovllm.utils.transfer import to_device


class DeviceState:
    """State of `max_num_seqs` slots and of one more, the padding slot, which no sequence has.

    Attributes (R = max_num_seqs + 1):
        tokens, positions, steps, seeds: [R] int64, views of one table: next token and its position (-1: padding), tokens
            generated so far, seed of the sampling noise.
        adapters: [R] int32, -1 for none. temperatures: [R] float32. block_tables: [R, max_blocks] int32.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.padding_slot = max_num_seqs
        self.table = torch.zeros(4, max_num_seqs + 1, dtype=torch.int64, device=device)
        self.tokens, self.positions, self.steps, self.seeds = self.table
        self.positions[self.padding_slot] = -1
        self.temperatures = torch.zeros(max_num_seqs + 1, dtype=torch.float32, device=device)
        self.adapters = torch.full((max_num_seqs + 1,), -1, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(max_num_seqs + 1, max_blocks, dtype=torch.int32, device=device)

    def update(self, step: ModelInput) -> None:
        """Take over what the host has to say before `step`: new blocks, and sequences that start to decode."""
        device = self.table.device
        if len(step.new_blocks):
            slots, columns, blocks = to_device(step.new_blocks, device)
            self.block_tables[slots, columns] = blocks.int()
        if step.new_adapters.shape[1]:
            slots, adapters = to_device(step.new_adapters, device)
            self.adapters[slots] = adapters.int()
        if len(step.new_temperatures):
            slots, *columns = to_device(step.new_sequences, device)
            self.table[:, slots] = torch.stack(columns)
            self.temperatures[slots] = to_device(step.new_temperatures, device)

    def gather_decode(self, slots: torch.Tensor) -> DecodeInputs:
        """Inputs of a decode of the sequences in `slots` [B]."""
        gather = gather_decode if use_triton(slots) else gather_decode_torch
        return gather(slots, self.tokens, self.positions, self.block_tables, self.block_size)

    def cache_slots(self, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Cache slots [T] of tokens at `positions` [T] of the sequences in `slots` [T]."""
        blocks = self.block_tables[slots, positions // self.block_size].long()
        return blocks * self.block_size + positions % self.block_size

    def advance(self, keys: torch.Tensor, slots: torch.Tensor, context_lens: torch.Tensor, out: torch.Tensor) -> None:
        """Decode `keys` [S] of the sequences in `slots` [S] to token ids in `out` [S], and go on to the next position."""
        step = advance if use_triton(keys) else advance_torch
        step(keys, slots, context_lens, self.tokens, self.positions, self.steps, out)
