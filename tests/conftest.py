"""Shared fixtures. Models are written once a session; a test that changes one makes its own with `tests.models.make_model`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter; it looks here when it is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.models import make_model

# Models here are so small that a second thread costs more in waiting than it computes.
torch.set_num_threads(1)


def let_the_interpreter_loop() -> None:
    """Triton 3.6's interpreter converts an array of one number to a loop's bound, which numpy 2.4 refuses (triton issue 9171)."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend


if os.environ.get("TRITON_INTERPRET") == "1":
    let_the_interpreter_loop()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 without tokenizer and without EOS: outputs end at max_tokens."""
    return make_model(tmp_path_factory.mktemp("models") / "qwen3")


@pytest.fixture(scope="session")
def chat_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with tokenizer and chat template."""
    return make_model(tmp_path_factory.mktemp("models") / "qwen3-chat", tokenizer=True)
