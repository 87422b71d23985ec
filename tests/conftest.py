"""Shared fixtures. Models are written once a session; a test that changes one makes its own with `tests.models.make_model`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models import make_model

# Models here are so small that a second thread costs more in waiting than it computes.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 without tokenizer and without EOS: outputs end at max_tokens."""
    return make_model(tmp_path_factory.mktemp("models") / "qwen3")


@pytest.fixture(scope="session")
def chat_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with tokenizer and chat template."""
    return make_model(tmp_path_factory.mktemp("models") / "qwen3-chat", tokenizer=True)
