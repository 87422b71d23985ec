"""The two ends of a step on the device: what a decode reads from its sequences' state, and the state's advance past a sampled token.

Between them runs the model. Both take the sequences as slots of the state (`engine.device_state`), so a captured CUDA graph
moves by itself from one step to the next. A slot with position -1 is padding: it stores nothing and never advances.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nanovllm.kernels.sampling import LEAST_KEY, key_to_token, keys_to_tokens
from nanovllm.kernels.triton_compat import tl, triton


class DecodeInputs(NamedTuple):
    """One new token of each of B sequences, int64 [B] each: its id and position, the cache slot it goes to (-1: none), and the
    tokens in the cache after the step."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    context_lens: torch.Tensor


def gather_decode_torch(
    slots: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor, block_tables: torch.Tensor, block_size: int
) -> DecodeInputs:
    """Inputs of the sequences in `slots` [B]; `tokens` and `positions` [R] hold each slot's next token, `block_tables` [R, W]."""
    token_ids, position = tokens[slots], positions[slots]
    inside = position.clamp(min=0)
    mapping = block_tables[slots, inside // block_size].long() * block_size + inside % block_size
    return DecodeInputs(token_ids, inside, torch.where(position < 0, -1, mapping), position + 1)


def gather_decode(
    slots: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor, block_tables: torch.Tensor, block_size: int
) -> DecodeInputs:
    """See `gather_decode_torch`."""
    batch = len(slots)
    out = DecodeInputs(*torch.empty(4, batch, dtype=torch.int64, device=slots.device))
    _gather_kernel[(triton.cdiv(batch, 256),)](
        slots, tokens, positions, block_tables, *out, batch, block_tables.stride(0), BLOCK_SIZE=block_size, BLOCK=256
    )
    return out


# Slots and lengths may be slices of one array at any address: no kernel is compiled twice for that.
@triton.jit(do_not_specialize=["batch"], do_not_specialize_on_alignment=["slots"])
def _gather_kernel(
    slots,
    tokens,
    positions,
    block_tables,
    token_ids,
    inside,
    slot_mapping,
    context_lens,
    batch,
    stride_table,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < batch
    slot = tl.load(slots + i, mask=live, other=0)
    position = tl.load(positions + slot, mask=live, other=-1)
    at = tl.maximum(position, 0)
    block = tl.load(block_tables + slot * stride_table + at // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
    tl.store(token_ids + i, tl.load(tokens + slot, mask=live, other=0), mask=live)
    tl.store(inside + i, at, mask=live)
    tl.store(slot_mapping + i, tl.where(position < 0, -1, block * BLOCK_SIZE + at % BLOCK_SIZE), mask=live)
    tl.store(context_lens + i, position + 1, mask=live)


def advance_torch(
    keys: torch.Tensor,
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    steps: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Take the sampled tokens into the state.

    Args:
        keys: [S] from `sample_keys`; reset to `LEAST_KEY`. slots, context_lens: [S] of the sequences that sampled.
        tokens, positions, steps: [R] the state: next token, its position, how many were generated; advanced.
        out: [S] int64, written with the token ids.
    """
    out.copy_(keys_to_tokens(keys))
    keys.fill_(LEAST_KEY)
    live = context_lens > 0
    tokens[slots] = torch.where(live, out, tokens[slots])
    positions[slots] = torch.where(live, context_lens, positions[slots])
    steps[slots] = steps[slots] + live


def advance(
    keys: torch.Tensor,
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    steps: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """See `advance_torch`."""
    count = len(keys)
    _advance_kernel[(triton.cdiv(count, 256),)](
        keys, slots, context_lens, tokens, positions, steps, out, count, LEAST=LEAST_KEY, BLOCK=256
    )


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["slots", "context_lens"])
def _advance_kernel(
    keys, slots, context_lens, tokens, positions, steps, out, count, LEAST: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < count
    key = tl.load(keys + i, mask=live, other=0)
    token = key_to_token(key)
    tl.store(out + i, token, mask=live)
    tl.store(keys + i, tl.full((BLOCK,), LEAST, tl.int64), mask=live)
    slot = tl.load(slots + i, mask=live, other=0)
    context_len = tl.load(context_lens + i, mask=live, other=0)
    moves = live & (context_len > 0)
    tl.store(tokens + slot, token, mask=moves)
    tl.store(positions + slot, context_len, mask=moves)
    tl.store(steps + slot, tl.load(steps + slot, mask=moves, other=0) + 1, mask=moves)
