"""Which part of the prompt tokens the prefix cache finds, where it keeps what was found before and where it only keeps the latest.

`python bench/prefix_cache.py --save prefix_cache`: the engine's block manager alone, without a model. 1,000 documents of 512 tokens with eight
questions each, after one instruction of 256: 64 rows at a time, in random order or near each other; and the same with every other row of
a document of its own. Pools are given in blocks of 64 tokens; all documents are 8,000.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import deque
from unittest import mock

from common import save

from nanovllm import SamplingParams
from nanovllm.engine import block_manager
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence

BLOCK = 64
DOCUMENTS, QUESTIONS, RUNNING = 1000, 8, 64
INSTRUCTION, DOCUMENT, OWN, OUTPUT = 256, 512, 128, 64


def found(pool: int, order: str, alone: float) -> float:
    """Prompt tokens found in the cache of `pool` blocks, as a part of all; `alone`: part of the rows with a document of their own."""
    rng = random.Random(1)
    manager = BlockManager(pool, BLOCK)
    rows = [document for document in range(DOCUMENTS) for _ in range(QUESTIONS)]
    rng.shuffle(rows)
    if order == "near":
        rows.sort(key=lambda document: document + rng.random() * 200)
    live: deque[Sequence] = deque()
    hits = total = 0
    for number, document in enumerate(rows):
        tokens = list(range(10**6, 10**6 + INSTRUCTION))
        if rng.random() < alone:
            tokens += [rng.randrange(10**5) for _ in range(DOCUMENT)]
        else:
            tokens += [document * 1000 + position for position in range(DOCUMENT)]
        tokens += [rng.randrange(10**5) for _ in range(OWN)]
        seq = Sequence(number, tokens, SamplingParams(), OUTPUT, seed=0)
        while True:
            matched = manager.match_prefix(seq)
            if len(live) < RUNNING and manager.num_new_blocks(seq, matched) + 2 <= manager.num_free_blocks:
                break
            manager.free(live.popleft())
        manager.allocate(seq, matched)
        hits += seq.num_computed_tokens
        total += len(tokens)
        seq.token_ids += [rng.randrange(10**5) for _ in range(OUTPUT)]
        manager.extend(seq, len(seq.token_ids))
        seq.num_computed_tokens = len(seq.token_ids)
        manager.register(seq)
        live.append(seq)
    return hits / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pools", type=int, nargs="+", default=[1500, 3000, 6000])
    parser.add_argument(
        "--parts", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.8], help="of FOUND_PART; 0: the latest only"
    )
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    args = parser.parse_args()
    rows = []
    for pool in args.pools:
        for order in ("random", "near"):
            for alone in (0.0, 0.5):
                row: dict[str, float | int | str] = {"pool": pool, "order": order, "alone": alone}
                for part in args.parts:
                    with mock.patch.object(block_manager, "FOUND_PART", part):
                        row[f"part_{part:g}"] = round(found(pool, order, alone), 4)
                rows.append(row)
                print(json.dumps(row), flush=True)
    if args.save:
        print(save(args.save, {"benchmark": "prefix_cache", "rows": rows}))


if __name__ == "__main__":
    main()
