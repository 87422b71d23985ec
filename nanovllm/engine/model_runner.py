"""One rank's model: loads it, sizes and holds its KV cache, and runs steps. Driven by an executor, in this or a child process."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from nanovllm.config import EngineConfig
from nanovllm.engine.chunk_input import ChunkInput, ChunkShape, ChunkStep
from nanovllm.engine.cuda_graph import (
    MAX_CHUNK_GRAPHS,
    ChunkGraphs,
    DecodeGraphs,
    MaskedSampling,
    graph_sizes,
    most_rows,
    sparse_graph_sizes,
)
from nanovllm.engine.device_state import DeviceState
from nanovllm.engine.extended_sampler import ExtendedSampler
from nanovllm.engine.model_input import ModelInput
from nanovllm.engine.row_sampling import SamplingInput
from nanovllm.engine.step_result import StepCopy
from nanovllm.engine.token_masks import mask_words
from nanovllm.errors import UserError
from nanovllm.kernels.fp8_cache import FP8, SCALE_BYTES, scales_shape
from nanovllm.kernels.sampling import LEAST_KEY, RowMasks
from nanovllm.kernels.triton_compat import FP8_CAPABILITY
from nanovllm.layers.attention import Attention, AttentionBatch, SharingBackend, select_backend
from nanovllm.layers.backends.torch_backend import TorchBackend
from nanovllm.layers.lora import AdapterTokens
from nanovllm.layers.parallel import TensorParallel
from nanovllm.layers.sampler import sample
from nanovllm.models.config import ModelConfig
from nanovllm.models.quantization import ONLINE_FP8
from nanovllm.models.registry import ARCHITECTURES
from nanovllm.utils.adapters import load_adapters, read_adapters
from nanovllm.utils.context import ForwardContext
from nanovllm.utils.hub import resolve_model
from nanovllm.utils.keep_quantized import can_keep_quantized, keep_quantized, materialize
from nanovllm.utils.loader import init_dummy, load_model
from nanovllm.utils.prefixes import Capacity
from nanovllm.utils.transfer import to_device

# A pool on the CPU is no larger than this: host memory is shared, and prefix reuse gains little beyond it.
MAX_CPU_POOL_BYTES = 4 << 30
# Of a GPU: what a CUDA context takes, what stays free whatever was asked for, and what a graph's description takes a layer.
CONTEXT_BYTES = 600 << 20
SPARE_BYTES = 256 << 20
GRAPH_LAYER_BYTES = 96 << 10
# Of a model, up to which even a large step's kernels take a host that has other things to do as long to launch as the device to run.
LARGE_GRAPH_WEIGHT_BYTES = 4 << 30


def resolve_device(config: EngineConfig, rank: int, apart: bool = False) -> torch.device:
    """The device of rank `rank`. `apart`: this process has a GPU for itself; else it sees those of all ranks.

    Raises:
        UserError: a GPU was asked for and there are none, or fewer than ranks.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "cpu" or (config.device == "auto" and gpus == 0):
        return torch.device("cpu")
    if apart:
        if gpus == 0:
            raise UserError(f"device={config.device!r} needs a GPU for each rank and rank {rank} sees none")
        return torch.device("cuda", 0)
    if gpus < config.tensor_parallel_size:
        raise UserError(
            f"device={config.device!r} with tensor_parallel_size={config.tensor_parallel_size} needs "
            f"{config.tensor_parallel_size} GPUs and {gpus} are visible; use device=cpu or fewer ranks"
        )
    return torch.device("cuda", rank)


def resolve_dtype(config: EngineConfig, model_config: ModelConfig, device: torch.device) -> torch.dtype:
    """The type of weights and activations. On a CPU "auto" is float32: most CPUs emulate the 16-bit types slowly."""
    name: str = config.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else model_config.dtype
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UserError(f"the checkpoint's dtype {name!r} is not known; set dtype to float32, float16 or bfloat16")
    return dtype


def resolve_cache_dtype(config: EngineConfig, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type of keys and values in the cache of a model in `dtype`.

    Raises:
        UserError: eight bits on a GPU whose kernels cannot convert them.
    """
    if config.kv_cache_dtype == "auto":
        return dtype
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else FP8_CAPABILITY
    if capability < FP8_CAPABILITY:
        raise UserError(
            f"kv_cache_dtype={config.kv_cache_dtype!r} needs a GPU of compute capability 8.9 or more and "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}; use kv_cache_dtype=auto"
        )
    return FP8


class Forward(NamedTuple):
    """A step of S sequences that sample, up to their last hidden states.

    Attributes:
        hidden: [T, H] of all tokens; last: [S, H] of those sequences' last ones.
        slots, lens: [S] their state slots, and tokens in the cache.
        decodes, padding: rows of `hidden` that are decodes, and those after them that are nothing's, as in a padded CUDA graph.
    """

    hidden: torch.Tensor
    last: torch.Tensor
    slots: torch.Tensor
    lens: torch.Tensor
    decodes: int = 0
    padding: int = 0

    def hidden_rows(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where in `hidden` the tokens of a step are that stand at `rows` of it without padding."""
        return np.where(rows < self.decodes, rows, rows + self.padding)


class StepGraphs(NamedTuple):
    """CUDA graphs of whole decode steps, and those, made as they are needed, of steps without their sampling: of decodes, and with chunks."""

    whole: DecodeGraphs
    forward: DecodeGraphs
    chunks: ChunkGraphs | None


class ModelRunner:
    """The model of one tensor-parallel rank.

    Steps are launched in order and may overlap with the host: nothing here waits for the device but `start`.

    Args:
        config: the engine's options; model_config: the model's shapes; max_model_len: longest sequence.
        tp: this rank and its process group.
        memory: what the engine may take of the GPU, where that was noted before the ranks met; None: from now on.
        device: this rank's; None: as `resolve_device` says.

    Raises:
        UserError: no such device or attention backend here, or it cannot read a cache of the type asked for.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        max_model_len: int,
        tp: TensorParallel,
        memory: GpuMemory | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.config = config
        self.model_config = model_config
        self.max_model_len = max_model_len
        self.tp = tp
        self.device = device or resolve_device(config, tp.rank)
        self.dtype = resolve_dtype(config, model_config, self.device)
        self.cache_dtype = resolve_cache_dtype(config, self.dtype, self.device)
        backend_class = select_backend(config.attention_backend, self.device)
        self.max_num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        self.num_kv_heads = max(1, model_config.num_kv_heads // tp.size)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            self.memory = memory or GpuMemory(self.device, config.gpu_memory_utilization)
        self.backend = backend_class(
            tp.shard(model_config.num_heads),
            self.num_kv_heads,
            model_config.head_dim,
            self.max_num_seqs,
            self.device,
            self.cache_dtype,
            self.dtype,
        )
        self.backend.check_block_size(config.kvcache_block_size)
        online = ONLINE_FP8 if config.quantization == "fp8" and model_config.quantization is None else None
        quantization = online or model_config.quantization
        keeps = quantization is not None and can_keep_quantized(self.device)
        with _default_dtype(self.dtype):
            model_class = ARCHITECTURES[model_config.architecture].load()
            with torch.device("meta") if keeps else self.device:
                model = model_class(model_config, tp, self.backend, max_model_len)
                if quantization is not None and keeps:
                    keep_quantized(model, quantization)
            if keeps:
                materialize(model, self.device)
            # The rotary table is made on the CPU, whatever the default device.
            self.model = model.to(self.device).eval()
            if config.load_format == "dummy":
                init_dummy(self.model)
            else:
                load_model(self.model, resolve_model(config.model), model_config.quantization, online)
        if quantization is not None and self.device.type == "cuda":
            torch.cuda.empty_cache()  # of what quantised weights were made of, some of it on streams that nothing else uses
        self.adapter_tokens: AdapterTokens | None = None
        if config.lora_adapters:
            with torch.device("meta"):
                whole = model_class(model_config, TensorParallel(), TorchBackend(1, 1, 1), max_position=1)
            self.adapter_tokens = AdapterTokens(len(config.lora_adapters))
            load_adapters(self.model, read_adapters(config.lora_adapters, whole), tp, self.adapter_tokens)
        self.attention_layers = [m for m in self.model.modules() if isinstance(m, Attention)]
        blocks = -(-max_model_len // config.kvcache_block_size)
        self.state = DeviceState(self.max_num_seqs, blocks, config.kvcache_block_size, self.device)
        self.keys = torch.full((self.max_num_seqs,), LEAST_KEY, dtype=torch.int64, device=self.device)
        # By whether some sequence has a low-rank adapter, and whether decodes share prefixes, so that other steps do nothing for it.
        self.graphs: dict[tuple[bool, bool], StepGraphs] = {}
        self.shares = False
        self.can_share = False
        if config.shares_prefixes and isinstance(self.backend, SharingBackend):
            self.can_share = True
            self.backend.enable_sharing(Capacity.of(self.max_num_seqs), self.max_num_seqs + 1)
        self.extended_sampler = ExtendedSampler(
            self.model.lm_head, self.state.temperatures, self.state.seeds, self.state.steps
        )
        self.masked_sampling: MaskedSampling | None = None
        self.adapted = False
        self.waits: tuple[Forward, npt.NDArray[np.int64]] | None = None

    @property
    def uses_graphs(self) -> bool:
        """Whether decode steps run as CUDA graphs."""
        return self.device.type == "cuda" and self.backend.supports_graphs and not self.config.enforce_eager

    @property
    def block_bytes(self) -> int:
        """Bytes one KV block takes on this rank, all layers, keys and values."""
        row = self.model_config.head_dim * self.cache_dtype.itemsize + (SCALE_BYTES if self.cache_dtype == FP8 else 0)
        return int(2 * len(self.attention_layers) * self.num_kv_heads * row * self.config.kvcache_block_size)

    def max_kvcache_blocks(self) -> int:
        """KV blocks this rank has memory for, and never more than `max_num_seqs` full sequences use.

        On a GPU: what a worst-case step leaves of the engine's share. On a CPU: a quarter of the free memory, at most
        `MAX_CPU_POOL_BYTES`.

        Raises:
            UserError: not even one block fits.
        """
        useful = self.max_num_seqs * -(-self.max_model_len // self.config.kvcache_block_size)
        if self.device.type == "cuda":
            graph_bytes = self._warm_up()  # before the budget: what it leaves allocated counts
            budget = self.memory.budget() - graph_bytes
        else:
            budget = min(_available_host_memory() // 4, MAX_CPU_POOL_BYTES)
        blocks = min(useful, budget // self.block_bytes)
        if blocks < 1:
            raise UserError(
                f"no memory for a single KV block of {self.block_bytes} bytes; raise gpu_memory_utilization, or lower "
                "max_num_batched_tokens or kvcache_block_size"
            )
        return int(blocks)

    @torch.inference_mode()
    def start(self, num_blocks: int) -> str:
        """Allocate the pool of `num_blocks` blocks and capture the graphs; one line that says what runs where.

        Raises:
            UserError: more blocks were asked for than there is memory for.
        """
        try:
            self._allocate_kv_cache(num_blocks)
        except torch.OutOfMemoryError:
            raise UserError(
                f"num_kvcache_blocks={num_blocks} of {self.block_bytes} bytes each do not fit the GPU's memory; lower it, or "
                "leave it out to have the pool sized from free memory"
            ) from None
        backend = type(self.backend).__name__.removesuffix("Backend").lower()
        backend += " (shared prefixes once)" if self.can_share else ""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        dtype = str(self.dtype).removeprefix("torch.")
        pool = f"{num_blocks} KV blocks of {self.config.kvcache_block_size} tokens ({num_blocks * self.block_bytes >> 20} MiB)"
        parts = [name, dtype, f"attention backend {backend}", pool + " in fp8" * (self.cache_dtype == FP8)]
        if self.uses_graphs:
            self.adapted = self.shares = False  # whatever the warm-up's steps had: what is captured holds nothing of it
            whole = self._graphs_of(False, False).whole
            whole.capture_all()
            self.masked_sampling = self._make_masked_sampling(whole.pool)
            parts.append(f"{len(whole.sizes)} CUDA graphs in {whole.seconds:.1f} s and {whole.num_bytes >> 20} MiB")
        else:
            parts.append("no CUDA graphs")
        return ", ".join(parts)

    @torch.inference_mode()
    def launch(self, step: ModelInput) -> StepCopy | None:
        """Start one step; what it samples, once it is done. None where it is extended: `sample` starts the rest of it."""
        self.state.update(step)
        self.adapted, self.shares = step.adapted, step.shares
        if step.shared is not None:
            assert isinstance(self.backend, SharingBackend)
            self.backend.load_shared(step.shared)
        graphs = self._graphs_of(step.adapted, step.shares) if self.graphs else None
        decodes = step.num_decodes == len(step.slots)
        if decodes and step.shares and graphs is not None:
            of_step = graphs.forward if step.extended else graphs.whole
            if not of_step.often(step.num_decodes):  # each for itself gives the same, and those graphs are there
                graphs, self.shares = self._graphs_of(step.adapted, False), False
        if decodes and graphs is not None and not step.extended:
            return StepCopy(graphs.whole.replay(step.slots)[0])
        if not decodes:
            forward = self._mixed(step, None if graphs is None else graphs.chunks)
        elif graphs is not None:
            hidden, lens = graphs.forward.replay(step.slots)
            forward = Forward(hidden, hidden, graphs.forward.slots[: len(hidden)], lens)
        else:
            forward = self._decode(to_device(step.slots, self.device), step.context_lens)
        if step.extended:
            self.waits = forward, step.slots[step.sample_rows]
            return None
        return StepCopy(self._sample(forward))

    @torch.inference_mode()
    def sample(self, asked: SamplingInput, filled: Future[None] | None = None) -> StepCopy:
        """Sample the extended step that was launched last, once its masks are `filled`; what it samples and reports, once it is done."""
        assert self.waits is not None, "no step waits for its sampling"
        (forward, host_slots), self.waits = self.waits, None
        if self.masked_sampling is not None and asked.asks_only_masks:
            sampling = self.masked_sampling
            sampling.load(forward.last, forward.lens, host_slots, asked.masked_rows)  # while they are being filled
            if filled is not None:
                filled.result()
            return StepCopy(sampling.replay(len(host_slots), asked.row_masks))
        if filled is not None:
            filled.result()
        slots, keys = forward.slots, self.keys[: len(forward.slots)]
        tokens = torch.empty(len(slots), dtype=torch.int64, device=self.device)
        logprobs = None
        if len(slots):
            logits = self.model.compute_logits(forward.last)
            if len(asked.rows) < len(slots):
                self._draw(logits, slots, keys, self._row_masks(asked, len(slots)))
            raw = self.extended_sampler.replace_keys(logits, slots, asked, keys)
            self.state.advance(keys, slots, forward.lens, tokens)
            logprobs = self.extended_sampler.sampled(raw, slots, asked, tokens)
        scored = asked._replace(score_rows=forward.hidden_rows(asked.score_rows))
        return StepCopy(tokens, logprobs, self.extended_sampler.score(forward.hidden, scored))

    def discard(self) -> None:
        """Forget a step that was cut short between its sampling and the state's advance, or before its sampling."""
        self.keys.fill_(LEAST_KEY)
        self.waits = None

    def _graphs_of(self, adapted: bool, shares: bool) -> StepGraphs:
        """The graphs of such steps; they are captured while `adapted` and `shares` are a step's."""
        found = self.graphs.get((adapted, shares))
        if found is None:
            first = self.graphs.get((False, False))
            found = self._make_graphs(None if first is None else first.whole.pool, sparse=shares)
            self.graphs[adapted, shares] = found
        return found

    def _make_graphs(self, pool: tuple[int, int] | None = None, sparse: bool = False) -> StepGraphs:
        def whole(slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (self._sample(self._decode(slots, None)),)

        def forward(slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
            step = self._decode(slots, None)
            return step.hidden, step.lens

        count, padding = self.max_num_seqs, self.state.padding_slot
        steps = DecodeGraphs(whole, count, padding, self.device, pool, sparse)
        forwards = DecodeGraphs(forward, count, padding, self.device, steps.pool, sparse)
        return StepGraphs(steps, forwards, self._make_chunk_graphs(steps.pool))

    def _make_chunk_graphs(self, pool: tuple[int, int]) -> ChunkGraphs | None:
        if not self.backend.most_tiles(1, 1):
            return None
        return ChunkGraphs(
            lambda inputs: self._forward_chunks(inputs, None)[:4],
            self.backend.most_tiles,
            self.max_num_seqs,
            self.config.max_num_batched_tokens,
            self.state.padding_slot,
            self.device,
            pool,
            self._graphs_are_large,
        )

    @property
    def _graphs_are_large(self) -> bool:
        """Whether steps with many chunk tokens have graphs. Ranks' common memory has no room for what pads them."""
        weights = sum(param.numel() * param.itemsize for param in self.model.parameters())
        return self.tp.size == 1 and weights <= LARGE_GRAPH_WEIGHT_BYTES

    def _make_masked_sampling(self, pool: tuple[int, int]) -> MaskedSampling:
        def sample(last: torch.Tensor, slots: torch.Tensor, lens: torch.Tensor, masks: RowMasks) -> torch.Tensor:
            return self._sample(Forward(last, last, slots, lens), masks)

        sizes, padding = self._masked_sampling_sizes, self.state.padding_slot
        return MaskedSampling(sample, *sizes, padding, self.device, pool)

    @property
    def _masked_sampling_sizes(self) -> tuple[int, int, torch.dtype, int]:
        config = self.model_config
        return config.hidden_size, mask_words(config.vocab_size), self.dtype, self.max_num_seqs

    def _decode(self, slots: torch.Tensor, host_lens: list[int] | None) -> Forward:
        """One token more of each sequence in `slots` [B]."""
        inputs = self.state.gather_decode(slots)
        batch = AttentionBatch(
            self.state.block_tables,
            self.config.kvcache_block_size,
            slots,
            inputs.context_lens,
            host_lens,
            shares=self.shares,
        )
        context = ForwardContext(inputs.slot_mapping, self.backend.plan(batch))
        self._adapt(slots)
        hidden = self.model(inputs.token_ids, inputs.positions, context)
        return Forward(hidden, hidden, slots, inputs.context_lens)

    def _adapt(self, slots: torch.Tensor) -> None:
        """Tell the layers which adapter each token has, from the state slots [T] of their sequences."""
        if self.adapter_tokens is not None:
            self.adapter_tokens.assign(self.state.adapters[slots] if self.adapted else None)

    def _mixed(self, step: ModelInput, graphs: ChunkGraphs | None) -> Forward:
        """A step with prefill chunks, after its decodes if it has any."""
        chunks = ChunkStep.of(step)
        tiles = self.backend.chunk_tiles(chunks.chunk_slots, chunks.chunk_query_lens, chunks.chunk_lens)
        shape = ChunkShape(step.num_decodes, len(step.token_ids), len(tiles), len(chunks.last_rows))
        if graphs is not None:
            replayed = graphs.replay(chunks, shape, tiles)
            if replayed is not None:
                padded, (hidden, last, slots, lens) = replayed
                return Forward(hidden, last, slots, lens, shape.decodes, padded.decodes - shape.decodes)
        array = to_device(chunks.pack(shape, tiles, self.state.padding_slot), self.device)
        return self._forward_chunks(ChunkInput.of(array, shape), chunks)

    def _forward_chunks(self, inputs: ChunkInput, chunks: ChunkStep | None) -> Forward:
        """Decodes and the chunks after them. `chunks`: what the host knows; None where `inputs` are padded, in a CUDA graph."""
        token_ids, positions, slots = inputs.token_ids, inputs.positions, inputs.token_slots
        if chunks is None:
            padding, positions = positions < 0, positions.clamp(min=0)
            slot_mapping = self.state.cache_slots(inputs.token_slots, positions).masked_fill(padding, -1)
        else:
            slot_mapping = self.state.cache_slots(inputs.token_slots, positions)
        decodes = self.state.gather_decode(inputs.decode_slots)
        batch = AttentionBatch(
            self.state.block_tables,
            self.config.kvcache_block_size,
            inputs.decode_slots,
            decodes.context_lens,
            None if chunks is None else chunks.step.context_lens[: chunks.step.num_decodes],
            chunk_tiles=inputs.tiles if len(inputs.tiles) else None,
            shares=self.shares,
        )
        if chunks is not None:
            batch = batch._replace(
                chunk_slots=chunks.chunk_slots, chunk_query_lens=chunks.chunk_query_lens, chunk_lens=chunks.chunk_lens
            )
        if len(inputs.decode_slots):
            token_ids = torch.cat((decodes.token_ids, token_ids))
            positions = torch.cat((decodes.positions, positions))
            slot_mapping = torch.cat((decodes.slot_mapping, slot_mapping))
            slots = torch.cat((inputs.decode_slots, slots))
        context = ForwardContext(slot_mapping, self.backend.plan(batch))
        self._adapt(slots)
        hidden = self.model(token_ids, positions, context)
        return Forward(hidden, hidden[inputs.last_rows], inputs.slots, inputs.lens)

    def _sample(self, forward: Forward, masks: RowMasks | None = None) -> torch.Tensor:
        """The next tokens [S]; the state moves past them."""
        slots = forward.slots
        tokens = torch.empty(len(slots), dtype=torch.int64, device=self.device)
        if len(slots):
            keys = self.keys[: len(slots)]
            self._draw(self.model.compute_logits(forward.last), slots, keys, masks)
            self.state.advance(keys, slots, forward.lens, tokens)
        return tokens

    def _draw(
        self, logits: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, masks: RowMasks | None = None
    ) -> None:
        """Sample from this rank's `logits` [S, columns] into `keys` [S]."""
        state = self.state
        sample(self.model.lm_head, logits, slots, state.temperatures, state.seeds, state.steps, keys, masks)

    def _row_masks(self, asked: SamplingInput, count: int) -> RowMasks | None:
        """Masks of those of `count` sampling rows that ask for nothing else."""
        if not len(asked.masked_rows):
            return None
        index = np.full(count, -1)
        index[asked.masked_rows] = np.arange(len(asked.masked_rows))
        return RowMasks(to_device(asked.row_masks, self.device), to_device(index, self.device))

    def _run(self, step: ModelInput) -> None:
        """Launch a plain step and wait for its end."""
        copy = self.launch(step._replace(adapted=self.adapter_tokens is not None))
        assert copy is not None
        copy.result()

    def _allocate_kv_cache(self, num_blocks: int) -> None:
        """Zeroed: attention reads padding slots and masks them, so all must be finite."""
        shape = (2, len(self.attention_layers), num_blocks, self.config.kvcache_block_size, self.num_kv_heads)
        pool = _zeros((*shape, self.model_config.head_dim), self.cache_dtype, self.device)
        for layer, k_cache, v_cache in zip(self.attention_layers, pool[0], pool[1], strict=True):
            layer.k_cache, layer.v_cache = k_cache, v_cache
        if self.cache_dtype == FP8:
            # Those of slots that nobody has written are read too, before the pool is sized: they must have an inverse.
            scales = torch.ones(shape[1], *scales_shape(*shape[2:]), dtype=torch.bfloat16, device=self.device)
            for layer, layer_scales in zip(self.attention_layers, scales, strict=True):
                layer.scales = layer_scales

    @torch.inference_mode()
    def _warm_up(self) -> int:
        """Run the largest steps there can be, so that what they take is taken before the pool is sized.

        All their sequences share block 0, whose contents mean nothing.

        Returns:
            Bytes to leave free for the graphs.
        """
        self._allocate_kv_cache(1)
        count = self.max_num_seqs
        lens = _lens_of(self.config.max_num_batched_tokens, count, self.max_model_len)
        self._run(_warm_up_step(lens, decode=False))
        graph_bytes = 0
        if self.can_share:
            # Compiled here, not in the middle of a job: the plan has a form for up to 256 sequences, and one for more.
            for size in sorted({min(count, 256), count}):
                self._run(_warm_up_step([1] * size, decode=True)._replace(shares=True))
        if self.uses_graphs:
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._run(_warm_up_step([self.max_model_len] * count, decode=True))
            if self.backend.most_tiles(1, 1):
                rows = most_rows(count, self.config.max_num_batched_tokens, large=self._graphs_are_large)
                self._run(_warm_up_step(_lens_of(rows, count, self.max_model_len), decode=False))
            peak = torch.cuda.max_memory_allocated(self.device) - before
            # Only one graph runs at a time, so they share the largest one's memory; each has its own description.
            graphs = 2 * len(graph_sizes(count)) + MAX_CHUNK_GRAPHS
            if self.can_share:
                graphs += 2 * len(sparse_graph_sizes(count)) + MAX_CHUNK_GRAPHS
            graphs *= 1 + bool(self.config.lora_adapters)
            graph_bytes = peak * 5 // 4 + graphs * len(self.attention_layers) * GRAPH_LAYER_BYTES
            # Of masked sampling, whose graphs are no larger than a layer's part of another.
            graph_bytes += len(graph_sizes(count)) * GRAPH_LAYER_BYTES
            graph_bytes += MaskedSampling.num_bytes(*self._masked_sampling_sizes)
        self._allocate_kv_cache(0)
        return graph_bytes


def _lens_of(tokens: int, count: int, most: int) -> list[int]:
    """Lengths of up to `count` sequences, as long as there may be, with `tokens` tokens in all."""
    lens: list[int] = []
    while tokens > 0 and len(lens) < count:
        lens.append(max(1, min(most, tokens - (count - len(lens) - 1))))
        tokens -= lens[-1]
    return lens


def _warm_up_step(lens: list[int], *, decode: bool) -> ModelInput:
    """A step of sequences with `lens` tokens: their last token only (`decode`), or all of them; every one samples."""
    count = len(lens)
    slots = np.arange(count)
    columns = (slots, np.zeros(count), np.array(lens) - 1, np.zeros(count), np.zeros(count))
    return ModelInput(
        num_decodes=count if decode else 0,
        slots=slots,
        query_lens=[1] * count if decode else lens,
        context_lens=lens,
        token_ids=np.zeros(0 if decode else sum(lens), dtype=np.int64),
        sample_rows=slots,
        new_blocks=np.zeros((3, 0), dtype=np.int64),
        new_sequences=np.stack(columns).astype(np.int64),
        new_temperatures=np.ones(count, dtype=np.float32),
    )


class GpuMemory:
    """What an engine may take of a GPU it may share: its fraction of the whole, and never more than there is free.

    Made before the model is, so that what the process takes from then on is known.
    """

    def __init__(self, device: torch.device, utilization: float) -> None:
        self.device = device
        self.utilization = utilization
        torch.zeros(1, device=device)  # the context exists from here on
        # Another engine of this process counts by its own fraction.
        self.reserved_at_start = torch.cuda.memory_reserved(device)
        self.outside_at_start = self._outside()

    def budget(self) -> int:
        """Bytes that are left for the KV pool and the graphs, after a worst-case step has run."""
        free, total = torch.cuda.mem_get_info(self.device)
        # Kernels, library handles and NCCL buffers. Another process that starts now is counted too: a smaller pool, not a crash.
        grown = max(0, self._outside() - self.outside_at_start)
        own = torch.cuda.memory_reserved(self.device) - self.reserved_at_start + CONTEXT_BYTES + grown
        return int(min(total * self.utilization - own, free - SPARE_BYTES))

    def _outside(self) -> int:
        """Bytes in use on the GPU that torch's allocator of this process does not hold."""
        free, total = torch.cuda.mem_get_info(self.device)
        return int(total - free - torch.cuda.memory_reserved(self.device))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros whose host memory is taken page by page as it is written: torch's own would touch the whole pool at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def _available_host_memory() -> int:
    """Bytes of host memory that can be had without swapping."""
    # Not Linux: no /proc, so the whole memory stands in for what is free of it.
    with suppress(OSError), open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
