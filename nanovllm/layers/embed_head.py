"""Token embedding and output head, both with the vocabulary sharded over ranks (padded to a multiple of the rank count)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from nanovllm.kernels.embedding import embedding_shard, embedding_shard_torch
from nanovllm.kernels.triton_compat import use_triton
from nanovllm.layers.parallel import TensorParallel


class VocabParallelEmbedding(nn.Module):
    """Rows of the embedding of this rank's part of the vocabulary; rows past the vocabulary's end are zero."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.vocab_size = vocab_size
        self.rows = -(-vocab_size // tp.size)
        self.start = self.rows * tp.rank
        self.weight = nn.Parameter(torch.zeros(self.rows, hidden_size), requires_grad=False)
        self.weight.weight_loader = self.load

    def load(self, param: nn.Parameter, tensor: torch.Tensor, part: str | None) -> None:
        """Copy this rank's rows."""
        rows = tensor[self.start : self.start + self.rows]
        param.data[: len(rows)].copy_(rows)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] token ids -> [T, hidden_size]."""
        if self.tp.size == 1:
            return F.embedding(token_ids, self.weight)
        lookup = embedding_shard if use_triton(token_ids) else embedding_shard_torch
        return self.tp.all_reduce(lookup(token_ids, self.weight, self.start))


class ParallelLMHead(VocabParallelEmbedding):
    """The output projection; holds its own weight, or the embedding's where the two are tied.

    Args:
        scale: what logits are multiplied by; softcap: a logit x becomes softcap * tanh(x / softcap), 0: it stays.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, tp: TensorParallel, scale: float = 1.0, softcap: float = 0.0
    ) -> None:
        super().__init__(vocab_size, hidden_size, tp)
        self.scale = scale
        self.softcap = softcap

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, hidden_size] -> logits [S, rows] of this rank's vocabulary ids, from `start`; those past its end mean nothing."""
        logits = F.linear(hidden, self.weight)
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        if self.softcap:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits
