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
    """Graphs of `decode`, each captured when it is first needed, unless `capture_all` did so before.

    Args:
        decode: a decode step of the sequences in the state slots [B] it is given; returns tensors of B rows.
        max_num_seqs: largest batch; padding_slot: fills up a graph's batch, and nothing happens to it.
        pool: of other graphs, whose memory these use too where only one of them all runs at a time.

    Attributes:
        seconds, num_bytes: what `capture_all` took.
    """

    def __init__(
        self,
        decode: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
        max_num_seqs: int,
        padding_slot: int,
        device: torch.device,
        pool: tuple[int, int] | None = None,
    ) -> None:
        self.decode = decode
        self.sizes = graph_sizes(max_num_seqs)
        self.padding_slot = padding_slot
        self.device = device
        self.slots = torch.full((max_num_seqs,), padding_slot, dtype=torch.int64, device=device)
        self.loaded = np.full(max_num_seqs, padding_slot)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...]]] = {}
        self.pool = pool or torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self.seconds, self.num_bytes = 0.0, 0

    def capture_all(self) -> None:
        """Capture the graphs of all sizes."""
        start = time.perf_counter()
        gc.collect()
        torch.cuda.empty_cache()  # as each capture does, so that it does not count
        free = torch.cuda.mem_get_info(self.device)[0]
        # The largest first: the smaller ones find room in its memory, as only one runs at a time.
        for size in reversed(self.sizes):
            self._capture(size)
        torch.cuda.synchronize(self.device)
        self.num_bytes = free - torch.cuda.mem_get_info(self.device)[0]
        self.seconds = time.perf_counter() - start

    def _capture(self, size: int) -> None:
        slots = self.slots[:size]
        # Nothing may happen to the sequences of the step that is to be run.
        wanted = slots.clone()
        slots.fill_(self.padding_slot)
        # Kernels are compiled and loaded outside of the capture.
        self.decode(slots)
        torch.cuda.current_stream(self.device).synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread of the process may use CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            outputs = self.decode(slots)
        self.graphs[size] = graph, outputs
        slots.copy_(wanted)

    def padded(self, batch: int) -> int:
        """Rows of the graph that runs `batch` sequences."""
        return self.sizes[bisect_left(self.sizes, batch)]

    def replay(self, slots: npt.NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
        """Decode the sequences in `slots` [B]; what `decode` returns, B rows of each, valid until the next replay on this stream."""
        count = len(slots)
        size = self.padded(count)
        wanted = np.full(size, self.padding_slot)
        wanted[:count] = slots
        if not np.array_equal(wanted, self.loaded[:size]):
            self.slots[:size].copy_(to_device(wanted, self.device))
            self.loaded[:size] = wanted
        if size not in self.graphs:
            self._capture(size)
        graph, outputs = self.graphs[size]
        graph.replay()
        return tuple(tensor[:count] for tensor in outputs)
