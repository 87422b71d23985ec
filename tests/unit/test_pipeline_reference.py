"""The reference of settings says everything the models know, and the committed file is the one they make."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanovllm import SamplingParams
from nanovllm.structured_outputs import StructuredOutputsParams
from pipelines.job import build
from pipelines.reference import REFERENCE, attributes, markdown, sections


def leaves(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """All settings by their names, from what `--print-config` nests."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found.update(leaves(value, f"{path}{name}.") if value and isinstance(value, dict) else {path + name: value})
    return found


def test_the_committed_file_is_up_to_date() -> None:
    assert REFERENCE.read_text(encoding="utf-8") == markdown(), "run: python -m pipelines.reference"


def test_every_setting_is_there_and_described() -> None:
    listed = [setting for section in sections() for setting in section.settings]
    names = [setting.name for setting in listed]
    assert len(names) == len(set(names))
    printed = leaves(build({"model": "m", "input": "i", "output": "o"}).as_dict())
    structured = {f"sampling.structured_outputs.{field.name}" for field in dataclasses.fields(StructuredOutputsParams)}
    assert set(names) == printed.keys() | structured
    undescribed = [setting.name for setting in listed if len(setting.description) < 10]
    assert undescribed == []
    text = REFERENCE.read_text(encoding="utf-8")
    for setting in listed:
        assert f"| `{setting.name}` | {setting.kind.replace('|', '')}" in text


def test_defaults_and_bounds_are_those_of_the_models() -> None:
    listed = {setting.name: setting for section in sections() for setting in section.settings}
    assert listed["run.hang_s"][1:3] == ("number, at least 2", "60.0")
    assert listed["engine.gpu_memory_utilization"][1:3] == ("number, above 0, at most 1", "0.9")
    assert listed["columns.samples"][1:3] == ("`list` or `rows`", "list")
    assert listed["sampling.stop"][1:3] == ("text or list of texts", "null")
    assert listed["columns.prefix"].default == '""'
    assert listed["model"].default == ""
    values = leaves(build({"model": "m", "input": "i", "output": "o"}).as_dict())
    for name, value in values.items():
        if name not in ("model", "input", "output"):
            assert yaml.safe_load(listed[name].default) == value, name


@pytest.mark.parametrize("kind", [SamplingParams, StructuredOutputsParams])
def test_docstrings_describe_every_attribute(kind: type) -> None:
    assert set(attributes(kind)) == {field.name for field in dataclasses.fields(kind)}


def test_the_command_writes_the_file(tmp_path: Path) -> None:
    """In a copy, so that a stale file is not mended by the test."""
    program = (
        "import runpy, pathlib, sys; write = pathlib.Path.write_text\n"
        "pathlib.Path.write_text = lambda self, text, **more: write(pathlib.Path(sys.argv[1]), text, **more)\n"
        "runpy.run_module('pipelines.reference', run_name='__main__')"
    )
    out = tmp_path / "out.md"
    root = REFERENCE.parent.parent
    subprocess.run([sys.executable, "-c", program, str(out)], cwd=root, check=True, capture_output=True, timeout=120)
    assert out.read_text(encoding="utf-8") == markdown()
