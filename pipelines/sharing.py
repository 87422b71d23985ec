"""How much of a dataset's prompts is shared: what `run.prefix_sort=auto` decides from. No I/O.

A job computes each block of KV cache that it does not find there. How often a prefix comes in the whole dataset, a sample does not show:
most prefixes of a million rows are in it once or never. Their number is estimated as ecologists estimate the species of a region from
some quadrats: Chao2, without replacement (Chao and Lin, 2012, "Nonparametric lower bounds for species richness and shared species
richness under sampling without replacement"), with stretches of consecutive rows as quadrats, so that rows which stand together already
are not taken for many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import xxhash


class Sharing(NamedTuple):
    """Prompt tokens of a whole dataset, and how many of them engines compute: as its rows stand, and with equal prefixes together."""

    tokens: float
    as_it_is: float
    together: float

    @property
    def saved(self) -> float:
        """Tokens that bringing rows together saves."""
        return self.as_it_is - self.together


def estimate(
    stretches: Sequence[Sequence[Sequence[int]]], rows: int, block: int, cached_tokens: float, engines: int
) -> Sharing:
    """What rows of a dataset share.

    Args:
        stretches: samples of consecutive rows from all over the dataset, each row as its prompt's token ids.
        rows: of the dataset.
        block: tokens of a block of KV cache, which is found whole or not at all.
        cached_tokens: that an engine's cache holds.
        engines: that share the rows.
    """
    chains = [[_chain(row, block) for row in stretch] for stretch in stretches if stretch]
    sampled = sum(map(len, chains))
    if not sampled:
        return Sharing(0.0, 0.0, 0.0)
    tokens = rows / sampled * sum(len(row) for stretch in stretches for row in stretch)
    # Rows that an engine remembers: it computes a prefix anew for about every such window in which it comes.
    window = min(rows / engines, max(1.0, cached_tokens * rows / max(1.0, tokens)))
    as_it_is = together = tokens
    for depth in range(max(len(chain) for stretch in chains for chain in stretch)):
        seen = [[chain[depth] for chain in stretch if len(chain) > depth] for stretch in chains]
        deep = rows / sampled * sum(map(len, seen))
        kinds = min(deep, _kinds(seen, sampled / rows))
        windows = rows / window
        met = kinds * windows * -np.expm1(deep / kinds * np.log1p(-1 / windows)) if windows > 1 else kinds
        near = deep * sum(len(set(stretch)) for stretch in seen) / sum(map(len, seen))
        together -= block * (deep - kinds)
        as_it_is -= block * (deep - max(kinds, min(met, near)))
    return Sharing(tokens, as_it_is, together)


def _chain(row: Sequence[int], block: int) -> list[int]:
    """A number for each whole block of a prompt, which stands for all tokens up to its end."""
    ids = np.asarray(row, dtype=np.int64)
    chain: list[int] = []
    for start in range(0, len(ids) - block + 1, block):
        chain.append(xxhash.xxh64_intdigest(ids[start : start + block].tobytes(), seed=chain[-1] if chain else 0))
    return chain


def _kinds(stretches: Sequence[Iterable[int]], fraction: float) -> float:
    """How many different values all stretches of a dataset have, by some that are so large a part of it (Chao2)."""
    found = Counter(value for stretch in stretches for value in set(stretch))
    once, twice = (sum(times == wanted for times in found.values()) for wanted in (1, 2))
    if fraction >= 1 or not once or len(stretches) < 2:
        return len(found)
    odds = fraction / (1 - fraction)
    return len(found) + once**2 / (2 * twice * len(stretches) / (len(stretches) - 1) + odds * once)
