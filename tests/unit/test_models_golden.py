"""Every family against logits that were written down: no transformers needed, and nothing that changes with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nanovllm.models.registry import ARCHITECTURES
from tests import golden
from tests.models import make_config


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_logits_are_those_written_down(family: str, tmp_path: Path) -> None:
    expected = torch.tensor(json.loads((golden.DIRECTORY / f"{family}.json").read_text())["logits"])
    with torch.inference_mode():
        found = golden.logits(golden.write_model(tmp_path, family))
    assert expected.std() > 0.1 and found.shape == (3, golden.VOCAB_SIZE)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_every_architecture_has_its_logits() -> None:
    assert {make_config(family)["architectures"][0] for family in golden.FAMILIES} == set(ARCHITECTURES)
