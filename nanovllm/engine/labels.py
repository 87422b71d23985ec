"""Scoring labels: which sequences to compute so that each label's probability as a continuation of a prompt is known exactly.

The labels' tokens form a tree. A sequence that holds the prompt and a path into the tree tells what comes next at every node on
its path, so the longest paths to nodes that have children cover all there is to know. Labels of one token each need the prompt
alone. Sequences share the KV blocks of the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Path = tuple[int, ...]


def label_paths(labels: Mapping[str, Sequence[int]]) -> list[tuple[Path, dict[int, list[int]]]]:
    """What to compute for `labels` (text -> token ids, none of them the beginning of another).

    Returns:
        Paths to append to the prompt, and for each the number of its tokens read -> ids whose log-probability is wanted then.
        Every pair of a node and what may follow it is asked for once.
    """
    children: dict[Path, set[int]] = {}
    for ids in labels.values():
        for depth, token in enumerate(ids):
            children.setdefault(tuple(ids[:depth]), set()).add(token)
    paths: list[tuple[Path, dict[int, list[int]]]] = []
    open_nodes = dict(children)
    for node in sorted(children, key=len, reverse=True):
        if node not in open_nodes:
            continue
        asked = {
            depth: sorted(open_nodes.pop(node[:depth])) for depth in range(len(node) + 1) if node[:depth] in open_nodes
        }
        paths.append((node, asked))
    return paths[::-1]  # the shortest first: it computes the prompt


def label_scores(labels: Mapping[str, Sequence[int]], logprobs: Mapping[tuple[Path, int], float]) -> dict[str, float]:
    """Log-probability of each label, from that of each (node, token) on its way."""
    return {
        text: math.fsum(logprobs[tuple(ids[:depth]), token] for depth, token in enumerate(ids))
        for text, ids in labels.items()
    }


def normalized(scores: Mapping[str, float]) -> dict[str, float]:
    """Probabilities that add up to 1, from log-probabilities."""
    most = max(scores.values())
    if most == -math.inf:
        return dict.fromkeys(scores, 1 / len(scores))
    weights = {text: math.exp(score - most) for text, score in scores.items()}
    total = math.fsum(weights.values())
    return {text: weight / total for text, weight in weights.items()}
