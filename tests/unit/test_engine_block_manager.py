"""The block manager's promises one by one: what is shared, what is evicted first, and that a hash collision is only a miss."""

from __future__ import annotations

from unittest import mock

import pytest

from nanovllm.engine import block_manager as block_manager_module
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

A, B, C, D = ([n * 10 + i for i in range(4)] for n in range(1, 5))


def admit(manager: BlockManager, tokens: list[int]) -> Sequence:
    """A sequence that has its blocks, all of them computed."""
    seq = Sequence(0, tokens, SamplingParams(), 100, seed=0)
    manager.allocate(seq, manager.match_prefix(seq))
    seq.num_computed_tokens = len(tokens)
    manager.register(seq)
    return seq


def cached_tokens(manager: BlockManager, tokens: list[int]) -> int:
    """What a prompt of `tokens` and one more would find in the cache."""
    seq = Sequence(0, [*tokens, 999], SamplingParams(), 100, seed=0)
    return len(manager.match_prefix(seq)) * manager.block_size


def test_full_blocks_are_shared_and_counted() -> None:
    manager = BlockManager(8, 4)
    first = admit(manager, [*A, *B, 1])
    second = admit(manager, [*A, *B, 2, 3])
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == 8
    assert first.block_table[:2] == second.block_table[:2]
    assert first.block_table[2] != second.block_table[2]
    assert manager.num_free_blocks == 4
    manager.free(first)
    assert manager.num_free_blocks == 5
    manager.free(second)
    assert manager.num_free_blocks == 8


def test_the_last_token_is_always_left_to_compute() -> None:
    manager = BlockManager(8, 4)
    admit(manager, [*A, *B])
    assert admit(manager, [*A, *B]).num_cached_tokens == 4
    assert admit(manager, [*A]).num_cached_tokens == 0
    assert admit(manager, [*A, *B, 1]).num_cached_tokens == 8


def test_equal_blocks_after_different_beginnings_are_not_equal() -> None:
    manager = BlockManager(16, 4)
    admit(manager, [*A, *C])
    assert cached_tokens(manager, [*B, *C]) == 0
    assert cached_tokens(manager, C) == 0
    admit(manager, [*B, *C])
    assert cached_tokens(manager, [*A, *C]) == cached_tokens(manager, [*B, *C]) == 8


def test_freed_blocks_stay_findable_until_they_are_handed_out() -> None:
    manager = BlockManager(3, 4)
    manager.free(admit(manager, [*A, *B]))
    assert cached_tokens(manager, [*A, *B]) == 8
    manager.free(admit(manager, [*C, *D, 1]))
    assert cached_tokens(manager, [*A, *B]) == 0


def test_least_recently_used_prefix_is_evicted_first() -> None:
    manager = BlockManager(4, 4)
    for tokens in (A, B, C, D):
        manager.free(admit(manager, tokens))
    manager.free(admit(manager, [*A, 7]))  # touches A; its second block takes B's place and caches nothing
    assert cached_tokens(manager, A) == 4
    assert cached_tokens(manager, B) == 0
    manager.free(admit(manager, [50, 51]))  # the block that caches nothing goes before any that does
    assert [cached_tokens(manager, t) for t in (A, C, D)] == [4, 4, 4]
    held = admit(manager, list(range(60, 68)))  # two blocks: the free one, then C, now the oldest
    assert [cached_tokens(manager, t) for t in (A, C, D)] == [4, 0, 4]
    manager.free(held)


def test_what_was_found_again_outlives_what_never_was() -> None:
    manager = BlockManager(8, 4)
    manager.free(admit(manager, [*A, 1]))
    manager.free(admit(manager, [*A, 2]))  # found
    for start in range(100, 160, 4):  # of one row each
        manager.free(admit(manager, list(range(start, start + 4))))
    assert cached_tokens(manager, A) == 4
    assert cached_tokens(manager, list(range(156, 160))) == 4
    held = admit(manager, list(range(200, 232)))
    assert cached_tokens(manager, A) == 0, "it goes where there is nothing else"
    manager.free(held)


def test_what_was_found_takes_a_part_of_the_pool_at_most() -> None:
    manager = BlockManager(8, 4)
    prompts = [list(range(start, start + 4)) for start in range(100, 124, 4)]
    for prompt in prompts:
        for own in range(2):
            manager.free(admit(manager, [*prompt, own]))
    assert [cached_tokens(manager, prompt) for prompt in prompts] == [4] * 6
    held = admit(
        manager, list(range(200, 216))
    )  # the two oldest found ones count no more, and go with what caches nothing
    assert [cached_tokens(manager, prompt) for prompt in prompts] == [0, 0, 4, 4, 4, 4]
    manager.free(held)
    assert manager.num_free_blocks == 8


def test_a_prefix_outlives_what_follows_it() -> None:
    manager = BlockManager(3, 4)
    manager.free(admit(manager, [*A, *B, *C]))
    manager.free(admit(manager, [1]))
    assert cached_tokens(manager, [*A, *B, *C]) == 8
    held = admit(manager, [1, 2, 3, 4, 5])
    assert cached_tokens(manager, [*A, *B, *C]) == 4
    manager.free(held)


def test_blocks_in_use_are_never_evicted() -> None:
    manager = BlockManager(4, 4)
    held = admit(manager, [*A, *B])
    for tokens in (C, D, [*C, *D]):
        manager.free(admit(manager, tokens))
    assert cached_tokens(manager, [*A, *B]) == 8
    assert not manager.can_extend(held, 17)
    assert manager.can_extend(held, 16)


def test_generated_tokens_are_cached_too() -> None:
    manager = BlockManager(8, 4)
    seq = admit(manager, [*A, 1, 2])
    for token in (3, 4, 5):
        seq.token_ids.append(token)
        manager.extend(seq, seq.num_tokens)
        seq.num_computed_tokens = seq.num_tokens
        manager.register(seq)
    manager.free(seq)
    assert cached_tokens(manager, [*A, 1, 2, 3, 4]) == 8


def test_preempted_sequence_finds_its_own_blocks_and_keeps_its_count() -> None:
    manager = BlockManager(8, 4)
    seq = admit(manager, [*A, *B, 1])
    manager.free(seq)
    assert seq.num_computed_tokens == 0
    manager.allocate(seq, manager.match_prefix(seq))
    assert seq.num_computed_tokens == 8
    assert seq.num_cached_tokens == 0, "the count tells what the prompt found at first admission"


def test_without_prefix_caching_nothing_is_shared() -> None:
    manager = BlockManager(8, 4, enable_prefix_caching=False)
    admit(manager, [*A, 1])
    second = admit(manager, [*A, 1])
    assert second.num_cached_tokens == 0
    assert manager.num_free_blocks == 4
    assert not manager.cached


def test_new_blocks_counts_idle_hits() -> None:
    """A cached block nobody holds leaves the free list when it is taken; one that is held does not."""
    manager = BlockManager(4, 4)
    seq = Sequence(0, [*A, *B, 1], SamplingParams(), 100, seed=0)
    held = admit(manager, A)
    assert manager.num_new_blocks(seq, manager.match_prefix(seq)) == 2
    manager.free(held)
    assert manager.num_new_blocks(seq, manager.match_prefix(seq)) == 3


@pytest.mark.parametrize("constant", [0, 7])
def test_a_hash_collision_is_a_miss(constant: int) -> None:
    with mock.patch.object(block_manager_module.xxhash, "xxh64_intdigest", return_value=constant):
        manager = BlockManager(8, 4)
        manager.free(admit(manager, [*A, *B]))
        assert cached_tokens(manager, [*A, *B]) == 4  # the second block found its hash taken
        assert cached_tokens(manager, B) == 0
        assert cached_tokens(manager, C) == 0
        seq = admit(manager, [*C, *D, 1])
        assert seq.num_cached_tokens == 0


def test_work_does_not_grow_with_the_pool() -> None:
    """Touch and evict look at the blocks of one sequence, never at the pool: counted, not timed."""

    def operations(num_blocks: int) -> int:
        manager = BlockManager(num_blocks, 4)
        for i in range(num_blocks):
            manager.free(admit(manager, [i, 0, 0, 0]))
        count = 0

        class Counting(type(manager.free_block_ids)):  # type: ignore[misc]
            def __iter__(self):  # type: ignore[no-untyped-def]
                nonlocal count
                for key in super().__iter__():
                    count += 1
                    yield key

        class CountingBlocks(list):  # type: ignore[type-arg]
            def __getitem__(self, index):  # type: ignore[no-untyped-def]
                nonlocal count
                count += 1
                return super().__getitem__(index)

            def __iter__(self):  # type: ignore[no-untyped-def]
                nonlocal count
                for block in super().__iter__():
                    count += 1
                    yield block

        manager.free_block_ids = Counting(manager.free_block_ids)
        manager.found_block_ids = Counting(manager.found_block_ids)
        manager.blocks = CountingBlocks(manager.blocks)
        count = 0
        manager.free(admit(manager, [num_blocks // 2, 0, 0, 0, 5, 5, 5, 5]))
        return count

    assert operations(1000) == operations(10)
