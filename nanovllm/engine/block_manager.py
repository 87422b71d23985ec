"""The paged KV cache's bookkeeping: which block belongs to whom, and which holds a prefix that can be reused. No torch.

Full blocks form a tree: a block's parent is the block before it, and each low-rank adapter has a tree of its own. A block is found by a chained xxhash (parent's hash, own
tokens) and taken only if its parent and its tokens are the same, so a hash collision costs a miss, never a wrong answer.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import xxhash

from nanovllm.engine.sequence import Sequence

# Part of the pool that free blocks may take which were found again, and are handed out after those that never were (bench/NOTES.md).
FOUND_PART = 0.25


class Block:
    """One KV block. `node` is 0 while the block is not in the prefix cache; `tokens` is what it holds there, as bytes; `found`: another sequence took it from there."""

    __slots__ = ("block_id", "found", "hash", "node", "parent", "ref_count", "tokens")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        self.hash = 0
        self.node = 0
        self.parent = 0
        self.found = False
        self.tokens = b""


class Match(NamedTuple):
    """Leading blocks that a sequence was given from the cache: `tokens` is what they hold, as bytes, under `root`; `nodes` are theirs then."""

    root: int
    tokens: bytes
    blocks: list[Block]
    nodes: list[int]
    hashes: list[int]


class BlockManager:
    """Hands out `num_blocks` blocks of `block_size` tokens; every operation is O(1) a block.

    Free blocks stay usable as prefix cache until they are handed out again: blocks that cache nothing first, then those that nobody has
    found there, then those that were found, each the least recently used first; of one sequence's the last. So instructions and documents
    of many rows outlive what only one of them has. Where found ones take more than a part of the pool, the oldest count as not found.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.blocks = [Block(i) for i in range(num_blocks)]
        self.free_block_ids: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.found_block_ids: OrderedDict[int, None] = OrderedDict()
        self.most_found = int(num_blocks * FOUND_PART)
        self.cached: dict[int, Block] = {}
        self.last_node = 0
        self.last_match: Match | None = None

    @property
    def num_free_blocks(self) -> int:
        """Blocks no sequence holds."""
        return len(self.free_block_ids) + len(self.found_block_ids)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, seq: Sequence) -> list[int]:
        """Ids of cached blocks that hold the longest known prefix of `seq`, at least its last token left to compute.

        Where log-probabilities of its prompt are asked for, nothing from there on is taken from the cache.
        """
        if not self.enable_prefix_caching:
            return []
        most = seq.num_tokens - 1
        if seq.extra is not None and seq.extra.first_scored is not None:
            most = min(most, seq.extra.first_scored)
        count = most // self.block_size
        blocks = self._as_last_time(seq, count)
        node = blocks[-1].node if blocks else seq.prefix_root
        for index in range(len(blocks), count):
            hash_value, tokens = self._content(seq, index)
            block = self._lookup(hash_value, node, tokens)
            if block is None:
                break
            blocks.append(block)
            node = block.node
        if blocks:
            tokens = seq.token_ids[: len(blocks) * self.block_size].tobytes()
            hashes = seq.block_hashes[: len(blocks)]
            self.last_match = Match(seq.prefix_root, tokens, blocks, [block.node for block in blocks], hashes)
        return [block.block_id for block in blocks]

    def _as_last_time(self, seq: Sequence, count: int) -> list[Block]:
        """The blocks of the last match, up to `count`, where `seq` begins with all they hold, and they still hold it: rows with one instruction
        follow each other, and are compared at once."""
        last = self.last_match
        if last is None or last.root != seq.prefix_root:
            return []
        shared = min(count, len(last.blocks))
        tokens = seq.token_ids[: shared * self.block_size].tobytes()
        if (
            tokens != last.tokens[: len(tokens)]
            or [block.node for block in last.blocks[:shared]] != last.nodes[:shared]
        ):
            return []
        known = len(seq.block_hashes)
        seq.block_hashes += last.hashes[known:shared]
        return last.blocks[:shared]

    def num_new_blocks(self, seq: Sequence, matched: list[int]) -> int:
        """Free blocks that `allocate` would take for all tokens of `seq`: the `matched` ones nobody holds count too."""
        idle = sum(self.blocks[block_id].ref_count == 0 for block_id in matched)
        return self.blocks_for(seq.num_tokens) - len(matched) + idle

    def allocate(self, seq: Sequence, matched: list[int]) -> None:
        """Give `seq` blocks for all its tokens, the `matched` ones first, and say what it need not compute."""
        for block_id in matched:
            block = self.blocks[block_id]
            if block.ref_count == 0:
                del (self.found_block_ids if block_id in self.found_block_ids else self.free_block_ids)[block_id]
            block.found = True
            block.ref_count += 1
        seq.block_table = list(matched)
        seq.num_registered_blocks = len(matched)
        seq.prefix_node = self.blocks[matched[-1]].node if matched else seq.prefix_root
        seq.num_computed_tokens = len(matched) * self.block_size
        if seq.num_cached_tokens < 0:
            seq.num_cached_tokens = seq.num_computed_tokens
        self.extend(seq, seq.num_tokens)

    def can_extend(self, seq: Sequence, num_tokens: int) -> bool:
        """Whether there are blocks for the first `num_tokens` tokens of `seq`."""
        return self.blocks_for(num_tokens) - len(seq.block_table) <= self.num_free_blocks

    def extend(self, seq: Sequence, num_tokens: int) -> None:
        """Lengthen the block table to hold `num_tokens` tokens."""
        while len(seq.block_table) * self.block_size < num_tokens:
            block_id, _ = (self.free_block_ids or self.found_block_ids).popitem(last=False)
            block = self.blocks[block_id]
            self._forget(block)
            block.ref_count = 1
            seq.block_table.append(block_id)

    def register(self, seq: Sequence) -> None:
        """Make the full blocks among the computed tokens findable, as far as the host knows the tokens.

        Called when those tokens are scheduled: a step stores all its keys and values before any of its attention reads
        them, so a sequence admitted later in the same step may already share them.
        """
        if not self.enable_prefix_caching:
            return
        num_tokens = min(seq.num_computed_tokens, len(seq.token_ids))
        for index in range(seq.num_registered_blocks, num_tokens // self.block_size):
            hash_value, tokens = self._content(seq, index)
            twin = self._lookup(hash_value, seq.prefix_node, tokens)
            if twin is not None:
                seq.prefix_node = twin.node
            else:
                self.last_node += 1
                if hash_value not in self.cached:
                    block = self.blocks[seq.block_table[index]]
                    block.hash, block.node, block.parent = hash_value, self.last_node, seq.prefix_node
                    block.tokens = tokens
                    self.cached[hash_value] = block
                seq.prefix_node = self.last_node
            seq.num_registered_blocks = index + 1

    def free(self, seq: Sequence) -> None:
        """Take all blocks from `seq`. Its last blocks become the first to be handed out again, so prefixes live longest."""
        for block_id in reversed(seq.block_table):
            block = self.blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0 and block.found:
                self.found_block_ids[block_id] = None
                if len(self.found_block_ids) > self.most_found:
                    oldest, _ = self.found_block_ids.popitem(last=False)
                    self.blocks[oldest].found = False
                    self.free_block_ids[oldest] = None
            elif block.ref_count == 0:
                self.free_block_ids[block_id] = None
                if block.node == 0:
                    self.free_block_ids.move_to_end(block_id, last=False)
        seq.block_table = []
        seq.reset_cache_position()

    def _content(self, seq: Sequence, index: int) -> tuple[int, bytes]:
        """Chained hash and tokens of block `index`; hashes once computed are kept with the sequence, and made in order."""
        tokens = seq.token_ids[index * self.block_size : (index + 1) * self.block_size].tobytes()
        hashes = seq.block_hashes
        if index == len(hashes):
            hashes.append(xxhash.xxh64_intdigest(tokens, seed=hashes[-1] if hashes else seq.adapter + 1))
        return hashes[index], tokens

    def _lookup(self, hash_value: int, parent: int, tokens: bytes) -> Block | None:
        block = self.cached.get(hash_value)
        if block is None or block.parent != parent or block.tokens != tokens:
            return None
        return block

    def _forget(self, block: Block) -> None:
        if block.node:
            del self.cached[block.hash]
            block.node = block.parent = block.hash = 0
            block.found = False
            block.tokens = b""
