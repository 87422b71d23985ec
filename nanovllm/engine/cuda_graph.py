"""CUDA graphs. Of whole decode steps, sampling and the state's advance included, for batch sizes dense enough to pad little: a graph
reads which sequences run from one array of state slots; everything else a step needs is in the device's state, so a replay is
one launch, and no copy unless a sequence has come or gone.

And of steps with few chunk tokens, as most steps of a job are that admits a row whenever one ends. Launched one by one, their kernels
would take the host longer than the device.
"""

from __future__ import annotations

import gc
import time
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from nanovllm.engine.chunk_input import ChunkInput, ChunkShape, ChunkStep
from nanovllm.kernels.sampling import RowMasks
from nanovllm.utils.transfer import to_device

Outputs = TypeVar("Outputs", bound=tuple[torch.Tensor, ...])

# Chunk tokens of graphs, but for larger ones of small models, see `ChunkGraphs`.
CHUNK_TOKENS = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
# Batch sizes of decodes beside chunks: so many of equal distance.
CHUNK_DECODE_SIZES = 8
# Sizes of larger ones between a power of two and the next.
LARGE_SIZES = 4
# Where there are many chunks: of those distances, how many apart.
MANY_STEPS = 4
# Graphs with chunks kept, the least recently used goes first.
MAX_CHUNK_GRAPHS = 48
# A capture takes as long as some steps without one: it is made when its size has come up so often.
CAPTURE_AT = 3
# Of steps with chunks: the first time loads the kernels, and a capture then takes no longer than to launch them.
CHUNK_CAPTURE_AT = 2


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture: all small ones, then steps of about 3 % and the tiles of the matrix products."""
    sizes = {*range(1, 9), *range(10, 33, 2), *range(36, 65, 4), *range(72, 257, 8), *range(272, 513, 16)}
    sizes |= set(range(544, max_num_seqs + 1, 32))
    return [size for size in sorted(sizes) if size < max_num_seqs] + [max_num_seqs]


def sparse_graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes of graphs that are captured while a job waits: few, as most of what a padded row costs are products of its tile."""
    sizes = {8, 16, *range(32, 513, 32), *range(576, max_num_seqs, 64)}
    return [size for size in sorted(sizes) if size < max_num_seqs] + [max_num_seqs]


def capture(
    run: Callable[[], Outputs],
    device: torch.device,
    pool: tuple[int, int],
    stream: torch.cuda.Stream,
    *,
    loaded: bool = False,
) -> tuple[torch.cuda.CUDAGraph, Outputs]:
    """A graph of what `run` launches, and what it returned.

    Args:
        run: changes nothing now; it is run once before, unless all its kernels are `loaded`, as none can be while a graph is captured.
    """
    if not loaded:
        run()
    # What is cached is as much as a step takes, and so as a graph may.
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if torch.cuda.mem_get_info(device)[0] < cached:
        torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    # Not `torch.cuda.graph`: that waits for the device, and gives all cached memory back, which the next steps have to ask for anew.
    with torch.cuda.stream(stream):
        # thread_local: another thread of the process may use CUDA meanwhile.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            outputs = run()
        finally:
            graph.capture_end()
    return graph, outputs


class DecodeGraphs:
    """Graphs of `decode`, each captured when it is first replayed, unless `capture_all` did so before.

    Args:
        decode: a decode step of the sequences in the state slots [B] it is given; returns tensors of B rows.
        max_num_seqs: largest batch; padding_slot: fills up a graph's batch, and nothing happens to it.
        pool: of other graphs, whose memory these use too where only one of them all runs at a time.
        sparse: of the sizes of `sparse_graph_sizes`.

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
        sparse: bool = False,
    ) -> None:
        self.decode = decode
        self.sizes = sparse_graph_sizes(max_num_seqs) if sparse else graph_sizes(max_num_seqs)
        self.wanted: Counter[int] = Counter()
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
        torch.cuda.empty_cache()  # here and below, so that what else is cached does not count
        free = torch.cuda.mem_get_info(self.device)[0]
        # The largest first: the smaller ones find room in its memory, as only one runs at a time.
        for size in reversed(self.sizes):
            self._capture(size)
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        self.num_bytes = free - torch.cuda.mem_get_info(self.device)[0]
        self.seconds = time.perf_counter() - start

    def _capture(self, size: int) -> None:
        slots = self.slots[:size]
        # Nothing may happen to the sequences of the step that is to be run.
        wanted = slots.clone()
        slots.fill_(self.padding_slot)
        self.graphs[size] = capture(lambda: self.decode(slots), self.device, self.pool, self.stream)
        slots.copy_(wanted)

    def often(self, batch: int) -> bool:
        """Whether the size of `batch` sequences has come up so often, with this time, that its graph is worth its capture."""
        size = self.padded(batch)
        self.wanted[size] += 1
        return self.wanted[size] >= CAPTURE_AT

    def padded(self, batch: int) -> int:
        """Rows of the graph that runs `batch` sequences."""
        return self.sizes[bisect_left(self.sizes, batch)]

    def replay(self, slots: npt.NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
        """Decode the sequences in `slots` [B]; what `decode` returns, B rows of each, valid until the next replay on this stream."""
        self.load(slots)
        return self.replay_loaded(len(slots))

    def load(self, slots: npt.NDArray[np.int64]) -> None:
        """Say which sequences `replay_loaded` decodes."""
        count = len(slots)
        size = self.padded(count)
        wanted = np.full(size, self.padding_slot)
        wanted[:count] = slots
        if not np.array_equal(wanted, self.loaded[:size]):
            self.slots[:size].copy_(to_device(wanted, self.device))
            self.loaded[:size] = wanted

    def replay_loaded(self, count: int) -> tuple[torch.Tensor, ...]:
        """`replay` of the `count` sequences loaded last."""
        size = self.padded(count)
        if size not in self.graphs:
            self._capture(size)
        graph, outputs = self.graphs[size]
        graph.replay()
        return tuple(tensor[:count] for tensor in outputs)


class MaskedSampling:
    """Graphs of sampling with masks over the vocabulary, after a step that was launched without its sampling.

    Args:
        sample: draws tokens [B] from last hidden states [B, H] of the sequences in state slots [B] with tokens in the cache [B], under masks.
        hidden_size: H; mask_words: words of a mask; dtype: of hidden states.
        max_num_seqs, padding_slot, pool: as in `DecodeGraphs`.
    """

    def __init__(
        self,
        sample: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, RowMasks], torch.Tensor],
        hidden_size: int,
        mask_words: int,
        dtype: torch.dtype,
        max_num_seqs: int,
        padding_slot: int,
        device: torch.device,
        pool: tuple[int, int],
    ) -> None:
        self.sample = sample
        self.device = device
        self.last = torch.zeros(max_num_seqs, hidden_size, dtype=dtype, device=device)
        self.lens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self.masks = RowMasks(
            torch.zeros(max_num_seqs, mask_words, dtype=torch.int32, device=device),
            torch.full((max_num_seqs,), -1, dtype=torch.int64, device=device),
        )
        self.loaded = np.full(max_num_seqs, -1)
        self.graphs = DecodeGraphs(self._run, max_num_seqs, padding_slot, device, pool)

    @staticmethod
    def num_bytes(hidden_size: int, mask_words: int, dtype: torch.dtype, max_num_seqs: int) -> int:
        """Memory of the inputs that stay."""
        width: int = dtype.itemsize
        return max_num_seqs * (hidden_size * width + 4 * mask_words + 16)

    def load(
        self, last: torch.Tensor, lens: torch.Tensor, slots: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
    ) -> None:
        """Take all of S sequences that `replay` samples but the masks.

        Args:
            last: [S, H]; lens: [S]; slots: [S] on the host.
            rows: [m] of the S that masks are of.
        """
        count = len(slots)
        size = self.graphs.padded(count)
        self.last[:count].copy_(last)
        self.lens[:count].copy_(lens)
        wanted = np.full(size, -1)
        wanted[rows] = np.arange(len(rows))
        if not np.array_equal(wanted, self.loaded[:size]):
            to_device(wanted, self.device, self.masks.index[:size])
            self.loaded[:size] = wanted
        self.graphs.load(slots)

    def replay(self, count: int, masks: npt.NDArray[np.int32]) -> torch.Tensor:
        """Sample the `count` sequences loaded last under `masks` [m, W]; their tokens [S], valid until the next replay on this stream."""
        to_device(masks, self.device, self.masks.bits[: len(masks)])
        (tokens,) = self.graphs.replay_loaded(count)
        return tokens

    def _run(self, slots: torch.Tensor) -> tuple[torch.Tensor]:
        count = len(slots)
        masks = RowMasks(self.masks.bits, self.masks.index[:count])
        # Nothing may happen to the padding slot, whoever's lengths stand there: all slots are it while a graph is captured.
        lens = self.lens[:count].masked_fill(slots == self.graphs.padding_slot, 0)
        return (self.sample(self.last[:count], slots, lens, masks),)


def most_chunk_tokens(max_num_batched_tokens: int) -> int:
    """Most chunk tokens of a graph, but for large ones."""
    return min(CHUNK_TOKENS[-1], max_num_batched_tokens)


def large_sizes(above: int, most: int) -> list[int]:
    """Chunk tokens of large graphs, `above` so many and up to `most`."""
    octaves = range((most // above).bit_length())
    sizes = [
        (above << octave) * (LARGE_SIZES + i) // LARGE_SIZES for octave in octaves for i in range(1, LARGE_SIZES + 1)
    ]
    return [size for size in sizes if above < size < most] + [most] * (most > above)


def decode_step(max_num_seqs: int) -> int:
    """Distance of the batch sizes of decodes beside chunks."""
    return -(-max_num_seqs // CHUNK_DECODE_SIZES)


def most_rows(max_num_seqs: int, max_num_batched_tokens: int, *, large: bool) -> int:
    """Rows of the largest step that a graph with chunks holds."""
    rows = most_chunk_tokens(max_num_batched_tokens) + max_num_seqs
    return max(rows, max_num_batched_tokens + decode_step(max_num_seqs)) if large else rows


class ChunkGraphs:
    """Graphs of steps with chunks up to their last hidden states, by padded size; each is captured when its size has come up again.

    Args:
        forward: a step, padded; returns tensors, of which those after the first have a row a sampling sequence.
        most_tiles: of so many tokens of so many chunks, see `AttentionBackend`.
        max_num_seqs: most decodes; max_num_batched_tokens: most tokens of a step.
        large: have graphs of steps with any number of tokens, as most steps are where prompts are long and answers short; for small
            models, whose kernels take no longer than their launches. They hold up to `most_rows` rows.
        padding_slot, pool: as in `DecodeGraphs`.
    """

    def __init__(
        self,
        forward: Callable[[ChunkInput], tuple[torch.Tensor, ...]],
        most_tiles: Callable[[int, int], int],
        max_num_seqs: int,
        max_num_batched_tokens: int,
        padding_slot: int,
        device: torch.device,
        pool: tuple[int, int],
        large: bool = False,
    ) -> None:
        self.forward = forward
        self.most_tiles = most_tiles
        self.budget = max_num_batched_tokens
        most = most_chunk_tokens(max_num_batched_tokens)
        self.tokens = [*(tokens for tokens in CHUNK_TOKENS if tokens < most), most]
        self.many_tokens = [*self.tokens[2:-1:3], most]
        self.most_small = most
        if large:
            sizes = large_sizes(most, max_num_batched_tokens)
            self.tokens += sizes
            self.many_tokens += sizes
        self.max_num_seqs = max_num_seqs
        self.decode_step = decode_step(max_num_seqs)
        self.padding_slot = padding_slot
        self.device = device
        self.pool = pool
        self.stream = torch.cuda.Stream(device)
        self.wanted: Counter[ChunkShape] = Counter()
        self.graphs: OrderedDict[ChunkShape, tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...]]] = OrderedDict()
        fewest = [0, *range(1, max_num_seqs + 1, self.decode_step)]  # decodes of each size
        steps = [(decodes, tokens) for decodes in fewest for tokens in (most, self.tokens[-1])]
        shapes = [self._padded(ChunkShape(*step, 0, 0), many=many) for step in steps for many in (False, True)]
        size = max(shape.size for shape in shapes if shape is not None)
        self.array = torch.zeros(size, dtype=torch.int64, device=device)

    def padded(self, shape: ChunkShape) -> ChunkShape | None:
        """The size of graph that holds a step of `shape`; None where there is none."""
        for many in (False, True):
            sizes = self._padded(shape, many=many)
            if sizes is None or (shape.tiles <= sizes.tiles and shape.samples <= sizes.samples):
                return sizes
        return None

    def _padded(self, shape: ChunkShape, *, many: bool) -> ChunkShape | None:
        """`padded`, with some chunks or with as many as there may be. Many short ones are rows that constraints leave one way: seldom
        the same numbers twice, so there are fewer sizes."""
        if shape.tokens > self.tokens[-1]:
            return None
        large = shape.tokens > self.most_small
        step = self.decode_step * (MANY_STEPS if many and not large else 1)
        decodes = min(-(-shape.decodes // step) * step, self.max_num_seqs)
        fewest = (decodes - 1) // step * step + 1 if decodes else 0  # of this size
        sizes = self.many_tokens if many else self.tokens
        tokens = sizes[bisect_left(sizes, shape.tokens)]
        if large:
            tokens = min(tokens, self.budget - fewest)
        chunks = min(tokens, self.max_num_seqs - fewest) if many else 8 + tokens // 32
        return ChunkShape(decodes, tokens, self.most_tiles(tokens, chunks), decodes + chunks)

    def replay(
        self, chunks: ChunkStep, shape: ChunkShape, tiles: npt.NDArray[np.int32]
    ) -> tuple[ChunkShape, tuple[torch.Tensor, ...]] | None:
        """Run a step of `shape`, as a graph or, until that is worth its capture, padded as in one; the size it was padded to, and what
        `forward` returns, of the sequences that sample, valid until the next graph of this pool.

        None: there is no graph for it, nothing was done.
        """
        padded = self.padded(shape)
        if padded is None:
            return None
        array = self.array[: padded.size]
        array.copy_(to_device(chunks.pack(padded, tiles, self.padding_slot), self.device))
        if padded not in self.graphs:
            self.wanted[padded] += 1
            if self.wanted[padded] >= CHUNK_CAPTURE_AT:
                self._capture(padded)
        if padded in self.graphs:
            self.graphs.move_to_end(padded)
            graph, outputs = self.graphs[padded]
            graph.replay()
        else:
            outputs = self.forward(ChunkInput.of(array, padded))
        hidden, *of_samples = outputs
        return padded, (hidden, *(tensor[: shape.samples] for tensor in of_samples))

    def _capture(self, shape: ChunkShape) -> None:
        while len(self.graphs) >= MAX_CHUNK_GRAPHS:
            torch.cuda.current_stream(self.device).synchronize()
            evicted, _ = self.graphs.popitem(last=False)
            self.wanted[evicted] = 0
        array = self.array[: shape.size]
        self.graphs[shape] = capture(
            lambda: self.forward(ChunkInput.of(array, shape)), self.device, self.pool, self.stream, loaded=True
        )
