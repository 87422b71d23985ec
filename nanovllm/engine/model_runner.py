"""One rank's model: loads it, sizes and holds its KV cache, and runs steps. Driven by an executor, in this or a child process."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch

from nanovllm.config import EngineConfig
from nanovllm.engine.model_input import ModelInput
from nanovllm.errors import UserError
from nanovllm.layers.attention import Attention, AttentionBatch, select_backend
from nanovllm.layers.parallel import TensorParallel
from nanovllm.layers.sampler import sample
from nanovllm.models.config import ModelConfig
from nanovllm.models.registry import ARCHITECTURES
from nanovllm.utils.context import ForwardContext
from nanovllm.utils.hub import resolve_model
from nanovllm.utils.loader import init_dummy, load_model

# A pool on the CPU is no larger than this: host memory is shared, and prefix reuse gains little beyond it.
MAX_CPU_POOL_BYTES = 4 << 30


def resolve_device(config: EngineConfig, rank: int) -> torch.device:
    """The device of rank `rank`.

    Raises:
        UserError: a GPU was asked for and there are none, or fewer than ranks.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "cpu" or (config.device == "auto" and gpus == 0):
        return torch.device("cpu")
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


class ModelRunner:
    """The model of one tensor-parallel rank.

    Args:
        config: the engine's options; model_config: the model's shapes; max_model_len: longest sequence.
        tp: this rank and its process group.

    Raises:
        UserError: no such device or attention backend here.
    """

    def __init__(self, config: EngineConfig, model_config: ModelConfig, max_model_len: int, tp: TensorParallel) -> None:
        self.config = config
        self.model_config = model_config
        self.max_model_len = max_model_len
        self.tp = tp
        self.device = resolve_device(config, tp.rank)
        self.dtype = resolve_dtype(config, model_config, self.device)
        backend_class = select_backend(config.attention_backend)
        self.num_kv_heads = max(1, model_config.num_kv_heads // tp.size)
        self.backend = backend_class(tp.shard(model_config.num_heads), self.num_kv_heads, model_config.head_dim)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        with _default_dtype(self.dtype), self.device:
            model_class = ARCHITECTURES[model_config.architecture].load()
            # The rotary table is made on the CPU, whatever the default device.
            self.model = model_class(model_config, tp, self.backend, max_model_len).to(self.device).eval()
        if config.load_format == "dummy":
            init_dummy(self.model)
        else:
            load_model(self.model, resolve_model(config.model))
        self.attention_layers = [m for m in self.model.modules() if isinstance(m, Attention)]

    @property
    def block_bytes(self) -> int:
        """Bytes one KV block takes on this rank, all layers, keys and values."""
        per_token = 2 * len(self.attention_layers) * self.num_kv_heads * self.model_config.head_dim
        return int(per_token * self.config.kvcache_block_size * self.dtype.itemsize)

    def max_kvcache_blocks(self) -> int:
        """KV blocks this rank has memory for, and never more than `max_num_seqs` full sequences use.

        On a GPU: what a worst-case step leaves of the engine's share. On a CPU: a quarter of the free memory, at most
        `MAX_CPU_POOL_BYTES`.

        Raises:
            UserError: not even one block fits.
        """
        useful = self.config.max_num_seqs * -(-self.max_model_len // self.config.kvcache_block_size)
        if self.device.type == "cuda":
            self._warm_up()
            free, total = torch.cuda.mem_get_info(self.device)
            headroom = int(total * (1 - self.config.gpu_memory_utilization))
            budget = free - headroom
        else:
            budget = min(_available_host_memory() // 4, MAX_CPU_POOL_BYTES)
        blocks = min(useful, budget // self.block_bytes)
        if blocks < 1:
            raise UserError(
                f"no memory for a single KV block of {self.block_bytes} bytes; raise gpu_memory_utilization, or lower "
                "max_num_batched_tokens or kvcache_block_size"
            )
        return int(blocks)

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Allocate the pool of `num_blocks` blocks. Zeroed: attention reads padding slots and masks them, so all must be finite."""
        shape = (2, len(self.attention_layers), num_blocks, self.config.kvcache_block_size, self.num_kv_heads)
        pool = _zeros((*shape, self.model_config.head_dim), self.dtype, self.device)
        for layer, k_cache, v_cache in zip(self.attention_layers, pool[0], pool[1], strict=True):
            layer.k_cache, layer.v_cache = k_cache, v_cache

    @torch.inference_mode()
    def execute(self, step: ModelInput) -> list[int]:
        """Run one step; the sampled token of each sequence that samples, in batch order."""
        block_tables = self._tensor(step.block_tables)
        batch = AttentionBatch(
            step.num_decodes, step.query_lens, step.context_lens, block_tables, self.config.kvcache_block_size
        )
        context = ForwardContext(self._tensor(step.slot_mapping), self.backend.plan(batch))
        hidden = self.model(self._tensor(step.token_ids), self._tensor(step.positions), context)
        if not len(step.sample_rows):
            return []
        logits = self.model.compute_logits(hidden[self._tensor(step.sample_rows)])
        if not step.temperatures.any():
            tokens = logits.argmax(dim=-1)
        else:
            sampling = (step.temperatures, step.seeds, step.sample_steps)
            tokens = sample(logits, *(self._tensor(array) for array in sampling))
        result: list[int] = tokens.tolist()
        return result

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def _warm_up(self) -> None:
        """Run the largest step there can be, so that the memory it takes is taken before the pool is sized."""
        block_size = self.config.kvcache_block_size
        tokens = self.config.max_num_batched_tokens
        lengths = [self.max_model_len] * (tokens // self.max_model_len)
        lengths += [tokens % self.max_model_len] if tokens % self.max_model_len else []
        lengths = lengths[: self.config.max_num_seqs]
        blocks = max(-(-length // block_size) for length in lengths)
        self.allocate_kv_cache(blocks)
        positions = np.concatenate([np.arange(length) for length in lengths])
        ends = np.cumsum(lengths)
        self.execute(
            ModelInput(
                token_ids=np.zeros(len(positions), dtype=np.int64),
                positions=positions,
                slot_mapping=positions,
                num_decodes=0,
                query_lens=lengths,
                context_lens=lengths,
                block_tables=np.tile(np.arange(blocks), (len(lengths), 1)),
                sample_rows=ends - 1,
                temperatures=np.ones(len(lengths), dtype=np.float32),
                seeds=np.zeros(len(lengths), dtype=np.int64),
                sample_steps=np.zeros(len(lengths), dtype=np.int64),
            )
        )
        self.allocate_kv_cache(0)
        torch.cuda.empty_cache()


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
