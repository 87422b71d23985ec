"""Logits that transformers computed once for a small model of every family: what the families are held to where it is not there.

`python -m tests.golden` writes `tests/data/golden/FAMILY.json` anew (it needs transformers), `logits` is what this engine's model
says to the same tokens.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanovllm.layers.attention import Attention, AttentionBatch
from nanovllm.layers.backends.torch_backend import TorchBackend
from nanovllm.layers.parallel import TensorParallel
from nanovllm.models.config import ModelConfig
from nanovllm.models.registry import ARCHITECTURES
from nanovllm.utils.context import ForwardContext
from nanovllm.utils.loader import load_model
from tests.models import make_model

DIRECTORY = Path(__file__).parent / "data" / "golden"
# Options beside the family's own: what is special to it is switched on, and shorter than the prompt.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    "qwen3": {},
    "granite": {},
    "smollm3": {},
    "phi3": {"hidden_size": 64, "partial_rotary_factor": 0.75, "sliding_window": 20},
    "mistral": {"sliding_window": 20},
    "qwen3_moe": {"num_hidden_layers": 3, "mlp_only_layers": [1]},
    "mixtral": {},
    "gemma2": {},
    "gemma3": {},
}
VOCAB_SIZE = 61
PROMPT = random.Random(0).choices(range(VOCAB_SIZE), k=48)
POSITIONS = (0, 21, 47)
BLOCK_SIZE = 16


def write_model(path: Path, family: str) -> Path:
    """The model of `family`."""
    return make_model(path, family, vocab_size=VOCAB_SIZE, **FAMILIES[family])


def logits(path: Path) -> torch.Tensor:
    """This engine's logits [POSITIONS, V] for PROMPT: its first half in one chunk, then the other."""
    config = ModelConfig.from_dir(path, ARCHITECTURES)
    backend = TorchBackend(config.num_heads, config.num_kv_heads, config.head_dim)
    model = ARCHITECTURES[config.architecture].load()(config, TensorParallel(), backend, 512)
    load_model(model, path)
    blocks = -(-len(PROMPT) // BLOCK_SIZE)
    for layer in model.modules():
        if isinstance(layer, Attention):
            shape = blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim
            layer.k_cache, layer.v_cache = torch.zeros(shape), torch.zeros(shape)
    table, none = torch.arange(blocks, dtype=torch.int32)[None], torch.zeros(0, dtype=torch.int64)
    parts = []
    for start, end in ((0, 24), (24, len(PROMPT))):
        batch = AttentionBatch(
            table, BLOCK_SIZE, none, none, [], np.array([0]), np.array([end - start]), np.array([end])
        )
        positions = torch.arange(start, end)
        context = ForwardContext(positions, backend.plan(batch))
        parts.append(model(torch.tensor(PROMPT[start:end]), positions, context))
    return model.compute_logits(torch.cat(parts)[list(POSITIONS)])


def write_all() -> None:
    """Ask transformers."""
    import transformers

    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
            path = write_model(Path(directory), family)
            # Gemma 2 leaves out its soft caps where attention is any other than this.
            oracle = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").float().eval()
            rows = oracle(torch.tensor([PROMPT])).logits[0, list(POSITIONS)]
        content = {
            "transformers": transformers.__version__,
            "logits": [[round(x, 5) for x in row] for row in rows.tolist()],
        }
        (DIRECTORY / f"{family}.json").write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    write_all()
