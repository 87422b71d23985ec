"""Python's garbage collector, while an engine runs."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Containers more than there were, before the youngest are looked at; most of an engine's go by themselves, when nobody refers to them.
YOUNG_OBJECTS = 20_000

_lock = threading.Lock()
_thresholds: list[tuple[int, int, int]] = []  # one for each that has settled the heap, as it found them


def settle_heap(collect: bool = True) -> None:
    """Take all objects there are out of the collector's sight, and have it look at new ones seldom, up to as many `unsettle_heap`.

    A full collection stops all threads while it looks at everything: with torch, transformers and Ray loaded 0.2 s, once a second of a job
    (bench/NOTES.md).

    Args:
        collect: what is no longer needed before, which else stays.
    """
    if collect:
        gc.collect()
    with _lock:
        _thresholds.append(gc.get_threshold())
        gc.freeze()
        gc.set_threshold(YOUNG_OBJECTS, *_thresholds[0][1:])


def unsettle_heap() -> None:
    """Undo one `settle_heap`; the last one lets the collector see all objects again."""
    with _lock:
        if _thresholds:
            found = _thresholds.pop()
            if not _thresholds:
                gc.unfreeze()
                gc.set_threshold(*found)


@contextmanager
def settled_heap() -> Iterator[None]:
    """The heap is settled meanwhile. A decorator too."""
    settle_heap(collect=False)
    try:
        yield
    finally:
        unsettle_heap()
