"""One request while the engine works on it: its tokens, its KV blocks and how far it has got. No torch, no tokenizer."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from enum import Enum, auto
from typing import TYPE_CHECKING

from nanovllm.engine.row_sampling import RowSampling
from nanovllm.outputs import FinishReason
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.engine.request_group import RequestGroup


# Type code of the arrays that hold tokens: 32 bits, signed. As Python's own numbers they would take ten times the memory and time.
TOKEN = "i"


class SequenceStatus(Enum):
    """Where a sequence is: preempted ones wait again."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """Prompt and generated tokens with their place in the KV cache.

    Attributes:
        token_ids: array of `TOKEN`, the prompt followed by the generated tokens the host has read.
        num_pending: tokens sampled, or being sampled, that the host has not read yet.
        max_new_tokens: generation ends with "length" after so many (the request's limit, the model's and the pool's).
        seed: of this sequence's random numbers.
        num_computed_tokens: leading tokens whose KV is in the cache, or will be after the step being scheduled.
        num_cached_tokens: prompt tokens taken from the prefix cache at first admission; -1 before it.
        block_table: ids of the KV blocks that hold the tokens, in order.
        block_hashes: chained hashes of the leading full blocks, computed once.
        num_registered_blocks, prefix_node: how much of the block table the prefix cache knows, and its last node.
        slot: its place in the device's state while it runs, else -1.
        num_sent_blocks, on_device: how much of the block table the device has, and whether it has the sampling state.
        adapter: which of the engine's low-rank adapters it has, in the order of their names; -1 for none.
        extra: what it asks of the sampler beyond a temperature, or None.
        group: the request it is a part of, where that has several sequences.
        problem: why it ended with "error", where it did so by itself.
    """

    __slots__ = (
        "adapter",
        "block_hashes",
        "block_table",
        "extra",
        "finish_reason",
        "group",
        "max_new_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_pending",
        "num_prompt_tokens",
        "num_registered_blocks",
        "num_sent_blocks",
        "on_device",
        "params",
        "prefix_node",
        "problem",
        "seed",
        "seq_id",
        "slot",
        "status",
        "token_ids",
    )

    def __init__(
        self,
        seq_id: int,
        token_ids: Iterable[int],
        params: SamplingParams,
        max_new_tokens: int,
        seed: int,
        extra: RowSampling | None = None,
        adapter: int = -1,
    ) -> None:
        self.seq_id = seq_id
        self.token_ids = array(TOKEN, token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.params = params
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.extra = extra
        self.adapter = adapter
        self.group: RequestGroup | None = None
        self.problem: str | None = None
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.num_cached_tokens = -1
        self.num_pending = 0
        self.slot = -1
        self.block_hashes: list[int] = []
        self.block_table: list[int] = []
        self.reset_cache_position()

    def reset_cache_position(self) -> None:
        """Forget what is in the KV cache: before admission, and after preemption."""
        self.num_computed_tokens = 0
        self.num_registered_blocks = 0
        self.prefix_node = self.prefix_root
        self.num_sent_blocks = 0
        self.on_device = False

    @property
    def prefix_root(self) -> int:
        """What the prefix cache begins with: an adapter's keys and values are its own."""
        return -1 - self.adapter if self.adapter >= 0 else 0

    @property
    def members(self) -> list[Sequence]:
        """All sequences of its request."""
        return [self] if self.group is None else self.group.members

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens, pending ones too."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_generated_tokens(self) -> int:
        """Generated tokens the host has read."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def generated_token_ids(self) -> list[int]:
        """The generated tokens the host has read."""
        return self.token_ids[self.num_prompt_tokens :].tolist()
