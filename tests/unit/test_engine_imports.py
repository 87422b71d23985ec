"""What importing costs and who knows whom (design, section 2)."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import nanovllm

PACKAGE = Path(nanovllm.__file__).parent
HEAVY = ("torch", "transformers", "ray", "triton", "flash_attn", "tokenizers")


def modules_after(statement: str) -> set[str]:
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    # From another directory, so that what is found is what is installed or on the path, not the folder beside us.
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n{code}"],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "statement",
    [
        "import nanovllm",
        "from nanovllm import SamplingParams, EngineConfig, UserError; EngineConfig.create('x')",
        "import nanovllm.engine.sequence, nanovllm.engine.block_manager, nanovllm.engine.scheduler",
        "import nanovllm.models.config, nanovllm.models.registry",
    ],
)
def test_light_imports(statement: str) -> None:
    assert modules_after(statement).isdisjoint(HEAVY)


def test_the_engine_imports_without_ray_or_gpu_packages() -> None:
    loaded = modules_after("from nanovllm import LLM, AsyncLLM")
    assert "torch" in loaded
    assert loaded.isdisjoint({"ray", "flash_attn", "pipelines", "cluster"})


def imported_names(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def test_no_file_of_the_engine_knows_ray_or_the_pipelines() -> None:
    files = list(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    for file in files:
        tops = {name.split(".")[0] for name in imported_names(file)}
        assert tops.isdisjoint({"ray", "pipelines", "cluster", "bench", "tests"}), file


def test_inner_rooms_do_not_know_the_outer_ones() -> None:
    """llm -> engine -> models -> layers -> kernels; `models.config`, `models.quantization` and `utils.context` are plain records."""
    allowed = {"nanovllm.models.config", "nanovllm.models.quantization", "nanovllm.utils.context", "nanovllm.errors"}
    order = ["kernels", "layers", "models", "engine"]
    for rank, room in enumerate(order):
        outer = tuple(f"nanovllm.{name}" for name in [*order[rank + 1 :], "llm", "async_llm"])
        for file in (PACKAGE / room).glob("*.py"):
            wrong = {n for n in imported_names(file) - allowed if n.startswith(outer)}
            assert not wrong, (file, wrong)


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LLm'"):
        nanovllm.LLm  # type: ignore[attr-defined] # noqa: B018
