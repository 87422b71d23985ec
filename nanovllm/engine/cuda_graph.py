"""CUDA graphs of whole decode steps, sampling and the state's advance included, for batch sizes dense enough to pad little.

A graph reads which sequences run from one array of state slots; everything else a step needs is in the device's state, so a
replay is one launch, and no copy unless a sequence has come or gone.
"""

from __future__ import annotations

import gc
import time
from bisect import bisect_left
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from nanovllm.utils.transfer import to_device


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture: all small ones, then steps of about 3 % and the tiles of the matrix products."""
    sizes = {*range(1, 9), *range(10, 33, 2), *range(36, 65, 4), *range(72, 257, 8), *range(272, 513, 16)}
    sizes |= set(range(544, max_num_seqs + 1, 32))
    return [size for size in sorted(sizes) if size < max_num_seqs] + [max_num_seqs]


class DecodeGraphs:
    """Graphs of `decode`, captured when this is made.

    Args:
        decode: a decode step of the sequences in the state slots [B] it is given; returns the sampled tokens [B].
        max_num_seqs: largest batch; padding_slot: fills up a graph's batch, and nothing happens to it.

    Attributes:
        seconds, num_bytes: what the capture took.
    """

    def __init__(
        self, decode: Callable[[torch.Tensor], torch.Tensor], max_num_seqs: int, padding_slot: int, device: torch.device
    ) -> None:
        start = time.perf_counter()
        self.sizes = graph_sizes(max_num_seqs)
        self.padding_slot = padding_slot
        self.device = device
        self.slots = torch.full((max_num_seqs,), padding_slot, dtype=torch.int64, device=device)
        self.loaded = np.full(max_num_seqs, padding_slot)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(device)
        gc.collect()
        torch.cuda.empty_cache()  # as each capture does, so that it does not count
        free = torch.cuda.mem_get_info(device)[0]
        # The largest first: the smaller ones find room in its memory, as only one runs at a time.
        for size in reversed(self.sizes):
            # Kernels are compiled and loaded outside of the capture.
            decode(self.slots[:size])
            torch.cuda.current_stream(device).synchronize()
            graph = torch.cuda.CUDAGraph()
            # thread_local: another thread of the process may use CUDA meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                tokens = decode(self.slots[:size])
            self.graphs[size] = graph, tokens
        torch.cuda.synchronize(device)
        self.num_bytes = free - torch.cuda.mem_get_info(device)[0]
        self.seconds = time.perf_counter() - start

    def padded(self, batch: int) -> int:
        """Rows of the graph that runs `batch` sequences."""
        return self.sizes[bisect_left(self.sizes, batch)]

    def replay(self, slots: npt.NDArray[np.int64]) -> torch.Tensor:
        """Decode the sequences in `slots` [B]; the tokens [B], valid until the next replay on this stream."""
        count = len(slots)
        size = self.padded(count)
        wanted = np.full(size, self.padding_slot)
        wanted[:count] = slots
        if not np.array_equal(wanted, self.loaded[:size]):
            self.slots[:size].copy_(to_device(wanted, self.device))
            self.loaded[:size] = wanted
        graph, tokens = self.graphs[size]
        graph.replay()
        return tokens[:count]
