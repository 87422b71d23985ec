"""What a model's work costs at the least: bytes moved once at the memory's pace, or the arithmetic where that takes longer.

`bench/roofline.py` adds up the steps of a workload, a job's report the sums over all its rows. Activations, launches and
communication between ranks count as free. No torch.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from nanovllm.models.config import ModelConfig
from nanovllm.models.quantization import ONLINE_FP8

ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Device(NamedTuple):
    """Ceilings of one GPU: `bandwidth` in B/s, `flops` of dense bf16 products in FLOP/s; `measured`, or of the data sheet.

    `fp8`: whether it computes with 8-bit floats, twice as fast.
    """

    name: str
    bandwidth: float
    flops: float
    measured: bool = False
    fp8: bool = True

    @property
    def flops_8bit(self) -> float:
        """Of dense products of 8-bit numbers; where there are none, those are widened."""
        return self.flops * (2 if self.fp8 else 1)


H200 = Device("H200", 4.3e12, 790e12, measured=True)  # device-to-device copy, and a large bf16 product
# By a pattern of the names that drivers give them; the first that is found counts.
_DEVICES = (
    (r"\bH200\b", H200),
    (r"\bH100 PCIe\b", Device("H100 PCIe", 2.0e12, 756e12)),
    (r"\bH100 NVL\b", Device("H100 NVL", 3.9e12, 835e12)),
    (r"\bH100\b", Device("H100 SXM", 3.35e12, 989e12)),
    (r"\bB200\b", Device("B200", 8.0e12, 2250e12)),
    (r"\bA100\b.*80 ?GB", Device("A100 80GB", 2.0e12, 312e12, fp8=False)),
    (r"\bA100\b", Device("A100 40GB", 1.555e12, 312e12, fp8=False)),
    (r"\bL40S\b", Device("L40S", 0.864e12, 362e12)),
    (r"\bL4\b", Device("L4", 0.3e12, 121e12)),
    (r"\bA10G\b", Device("A10G", 0.6e12, 70e12, fp8=False)),
    (r"\bA10\b", Device("A10", 0.6e12, 125e12, fp8=False)),
)


def find_device(name: str) -> Device | None:
    """The ceilings of a GPU by the name its driver gives it (`NVIDIA A100-SXM4-80GB`); None where they are not known."""
    if "MIG" in name.split():
        return None  # a part of it
    return next((device for pattern, device in _DEVICES if re.search(pattern, name)), None)


def weight_costs(model: ModelConfig, quantization: str | None) -> tuple[float | None, bool]:
    """Bytes of a weight of the linear layers as a GPU keeps it (None: of the model's type), and whether products are of 8-bit numbers.

    Args:
        quantization: the engine's option.
    """
    stored = model.quantization or (ONLINE_FP8 if quantization else None)
    if stored is None:
        return None, False
    schemes = [scheme for _, scheme in stored.schemes]
    return max(scheme.bits for scheme in schemes) / 8, all(scheme.activations for scheme in schemes)


@dataclass(frozen=True)
class Costs:
    """Least seconds of the parts of a step, on a group of equal devices that share one copy of the model.

    Attributes:
        parameters: weights that every token uses; the output head and experts left out.
        expert_parameters: those of all experts, of which a token uses `expert_part`.
        lm_head: weights of the output head.
        kv_layer: bytes that one token holds in the KV cache of a layer.
        windows: for each attention window (0: none) how many layers have it.
        q_size: query width; a pair of positions costs 4 of it in FLOP in each layer.
        vocab_size: logits of a sequence.
        weight_bytes: of one weight; head_bytes: of one of the output head, which is never quantised.
        bandwidth, kv_bandwidth, flops: of the whole group; the KV cache's is less where ranks hold copies of KV heads.
        linear_flops: of the products with quantised weights.
    """

    parameters: int
    expert_parameters: int
    expert_part: float
    lm_head: int
    kv_layer: float
    windows: tuple[tuple[int, int], ...]
    q_size: int
    vocab_size: int
    weight_bytes: float
    head_bytes: float
    bandwidth: float
    kv_bandwidth: float
    flops: float
    linear_flops: float

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        *,
        tp: int = 1,
        weight_bytes: float | None = None,
        kv_bytes: float | None = None,
        bandwidth: float = H200.bandwidth,
        flops: float = H200.flops,
        linear_flops: float | None = None,
    ) -> Costs:
        """Costs of a model on `tp` devices of `bandwidth` and `flops` each.

        `weight_bytes` and `kv_bytes` are those of one element (default: the model's type), see `weight_costs`; `linear_flops` as
        `flops`, of the linear layers (default: the same).
        """
        element = ELEMENT_BYTES[model.dtype]
        q_size, kv_size = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        attention_weights = model.hidden_size * (q_size + 2 * kv_size) + q_size * model.hidden_size
        sparse = sum(layer.sparse for layer in model.layers)
        dense = (model.num_layers - sparse) * 3 * model.hidden_size * model.intermediate_size
        experts = taken = expert_size = 0
        if model.moe is not None:
            experts, taken, expert_size = model.moe[:3]
        router = sparse * model.hidden_size * experts
        return cls(
            parameters=model.num_layers * attention_weights + dense + router,
            expert_parameters=sparse * experts * 3 * model.hidden_size * expert_size,
            expert_part=taken / max(1, experts),
            lm_head=model.vocab_size * model.hidden_size,
            kv_layer=2 * kv_size * (kv_bytes or element),
            windows=tuple(Counter(layer.window for layer in model.layers).items()),
            q_size=q_size,
            vocab_size=model.vocab_size,
            weight_bytes=weight_bytes or element,
            head_bytes=element,
            bandwidth=bandwidth * tp,
            kv_bandwidth=bandwidth * min(tp, model.num_kv_heads),
            flops=flops * tp,
            linear_flops=(linear_flops or flops) * tp,
        )

    @property
    def _used(self) -> float:
        return self.parameters + self.expert_parameters * self.expert_part

    def prefill(self, tokens: float, pairs: float, rows: float) -> float:
        """Prompts: the linear layers over `tokens`, causal attention over half of `pairs`, one row of logits each."""
        attended = self._in_windows(pairs, 2 * tokens)
        return (
            2 * self._used * tokens / self.linear_flops
            + 2 * (self.q_size * attended + self.lm_head * rows) / self.flops
        )

    def weights(self, batch: float) -> float:
        """The linear layers of a decode step of `batch` sequences, which take experts evenly."""
        missed: float = (1 - self.expert_part) ** batch
        touched = self.parameters + self.expert_parameters * (1 - missed)
        return max(touched * self.weight_bytes / self.bandwidth, 2 * self._used * batch / self.linear_flops)

    def kv(self, batch: float, context: float, read: float | None = None) -> float:
        """Attention of decode steps: `context` tokens are read (`read` where reads are shared), one a sequence is written.

        With windows the sequences count as equally long.
        """
        reads = self._in_windows(context if read is None else read, batch)
        written = batch * sum(layers for _, layers in self.windows)
        flop = 4 * self.q_size * self._in_windows(context, batch)
        return max((reads + written) * self.kv_layer / self.kv_bandwidth, flop / self.flops)

    def logits(self, batch: float) -> float:
        """The output head of a decode step; logits are written once, in two bytes each."""
        moved = self.lm_head * self.head_bytes + 2 * batch * self.vocab_size
        return max(moved / self.bandwidth, 2 * self.lm_head * batch / self.flops)

    def _in_windows(self, context: float, queries: float) -> float:
        """Tokens of `context` in the windows of `queries`, added up over the layers."""
        return sum(layers * (min(context, window * queries) if window else context) for window, layers in self.windows)


class Work(NamedTuple):
    """What many rows add up to.

    Attributes:
        rows: prompts.
        prefill_tokens: prompt tokens to compute.
        prefill_pairs: positions that they attend to, twice over: the square of the length where a prompt is computed whole.
        decode_tokens: tokens generated after each text's first, which prefill makes.
        decode_context: tokens of context that they attend to.
    """

    rows: float
    prefill_tokens: float
    prefill_pairs: float
    decode_tokens: float
    decode_context: float


class Parts(NamedTuple):
    """Least seconds, and where they go."""

    prefill: float
    weights: float
    kv: float
    lm_head: float

    @property
    def seconds(self) -> float:
        """All of them."""
        return sum(self)


def least_seconds(costs: Costs, work: Work, batch: float) -> Parts:
    """Least seconds of `work` on one group whose decode steps all hold `batch` sequences, the most that may run at once."""
    steps = work.decode_tokens / batch
    return Parts(
        prefill=costs.prefill(work.prefill_tokens, work.prefill_pairs, work.rows),
        weights=steps * costs.weights(batch),
        kv=costs.kv(work.decode_tokens, work.decode_context),
        lm_head=steps * costs.logits(batch),
    )
