"""What a model's work costs at the least: bytes moved once at the memory's pace, or the arithmetic where that takes longer.

`bench/roofline.py` adds up the steps of a workload, a job's report the sums over all its rows. Activations, launches and
communication between ranks count as free. No torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from nanovllm.models.config import ModelConfig

ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Device(NamedTuple):
    """Ceilings of one GPU: `bandwidth` in B/s, `flops` of dense bf16 products in FLOP/s; `measured`, or of the data sheet."""

    name: str
    bandwidth: float
    flops: float
    measured: bool = False


H200 = Device("H200", 4.3e12, 790e12, measured=True)  # device-to-device copy, and a large bf16 product
# By a pattern of the names that drivers give them; the first that is found counts.
_DEVICES = (
    (r"\bH200\b", H200),
    (r"\bH100 PCIe\b", Device("H100 PCIe", 2.0e12, 756e12)),
    (r"\bH100 NVL\b", Device("H100 NVL", 3.9e12, 835e12)),
    (r"\bH100\b", Device("H100 SXM", 3.35e12, 989e12)),
    (r"\bB200\b", Device("B200", 8.0e12, 2250e12)),
    (r"\bA100\b.*80 ?GB", Device("A100 80GB", 2.0e12, 312e12)),
    (r"\bA100\b", Device("A100 40GB", 1.555e12, 312e12)),
    (r"\bL40S\b", Device("L40S", 0.864e12, 362e12)),
    (r"\bL4\b", Device("L4", 0.3e12, 121e12)),
    (r"\bA10G\b", Device("A10G", 0.6e12, 70e12)),
    (r"\bA10\b", Device("A10", 0.6e12, 125e12)),
)


def find_device(name: str) -> Device | None:
    """The ceilings of a GPU by the name its driver gives it (`NVIDIA A100-SXM4-80GB`); None where they are not known."""
    return next((device for pattern, device in _DEVICES if re.search(pattern, name)), None)


@dataclass(frozen=True)
class Costs:
    """Least seconds of the parts of a step, on a group of equal devices that share one copy of the model.

    Attributes:
        parameters: weights that a token uses, the output head left out; of a mixture of experts those it takes.
        lm_head: weights of the output head.
        kv_token: bytes that one token holds in the KV cache, over all layers.
        attention: query width times layers; a pair of positions costs 4 of it in FLOP.
        vocab_size: logits of a sequence.
        weight_bytes: of one weight.
        bandwidth, kv_bandwidth, flops: of the whole group; the KV cache's is less where ranks hold copies of KV heads.
        expert: weights of one expert, over all layers that have any; experts, top_k: how many a layer has, and a token takes.
    """

    parameters: int
    lm_head: int
    kv_token: float
    attention: int
    vocab_size: int
    weight_bytes: float
    bandwidth: float
    kv_bandwidth: float
    flops: float
    expert: int = 0
    experts: int = 1
    top_k: int = 1

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
    ) -> Costs:
        """Costs of a model on `tp` devices of `bandwidth` and `flops` each.

        `weight_bytes` and `kv_bytes` are those of one element (default: the model's type).
        """
        weight_bytes = weight_bytes or ELEMENT_BYTES[model.dtype]
        kv_bytes = kv_bytes or ELEMENT_BYTES[model.dtype]
        q_size, kv_size = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        attention_weights = model.hidden_size * (q_size + 2 * kv_size) + q_size * model.hidden_size
        sparse = sum(layer.sparse for layer in model.layers)
        parameters = model.num_layers * attention_weights
        parameters += (model.num_layers - sparse) * 3 * model.hidden_size * model.intermediate_size
        expert, experts, top_k = 0, 1, 1
        if model.moe is not None:
            experts, top_k = model.moe.num_experts, model.moe.experts_per_token
            expert = sparse * 3 * model.hidden_size * model.moe.intermediate_size
            parameters += sparse * experts * model.hidden_size + top_k * expert
        return cls(
            parameters=parameters,
            lm_head=model.vocab_size * model.hidden_size,
            kv_token=2 * model.num_layers * kv_size * kv_bytes,
            attention=q_size * model.num_layers,
            vocab_size=model.vocab_size,
            weight_bytes=weight_bytes,
            bandwidth=bandwidth * tp,
            kv_bandwidth=bandwidth * min(tp, model.num_kv_heads),
            flops=flops * tp,
            expert=expert,
            experts=experts,
            top_k=top_k,
        )

    def prefill(self, tokens: float, pairs: float, rows: float) -> float:
        """Prompts: the linear layers over `tokens`, causal attention over half of `pairs`, one row of logits each."""
        return (2 * self.parameters * tokens + 2 * self.attention * pairs + 2 * self.lm_head * rows) / self.flops

    def weights(self, batch: float) -> float:
        """The linear layers of a decode step of `batch` sequences; of the experts those are read that tokens which choose at random hit."""
        missed: float = (1 - self.top_k / self.experts) ** batch
        hit = self.experts * (1 - missed)
        read = self.parameters + (hit - self.top_k) * self.expert
        return max(read * self.weight_bytes / self.bandwidth, 2 * self.parameters * batch / self.flops)

    def kv(self, batch: float, context: float, read: float | None = None) -> float:
        """Attention of decode steps: `context` tokens are read (`read` where reads are shared), one a sequence is written."""
        moved = ((context if read is None else read) + batch) * self.kv_token
        return max(moved / self.kv_bandwidth, 4 * self.attention * context / self.flops)

    def logits(self, batch: float) -> float:
        """The output head of a decode step; logits are written once, in two bytes each."""
        moved = self.lm_head * self.weight_bytes + 2 * batch * self.vocab_size
        return max(moved / self.bandwidth, 2 * self.lm_head * batch / self.flops)


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
