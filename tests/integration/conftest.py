"""One dataset and the output of one undisturbed job, for all tests that compare with it."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.integration.jobs import SLOW, run, write_prompts


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="session")
def dataset(workplace: Path) -> Path:
    """240 rows in two files; row 7 is null and row 8 empty."""
    source = workplace / "dataset"
    write_prompts(source, {"a.parquet": 160, "b.parquet": 80}, row_group_size=70)
    table = pq.read_table(source / "a.parquet")
    prompts = table["prompt"].to_pylist()
    prompts[7], prompts[8] = None, ""
    pq.write_table(table.set_column(1, "prompt", pa.array(prompts)), source / "a.parquet", row_group_size=70)
    return source


@pytest.fixture(scope="session")
def undisturbed(workplace: Path, dataset: Path, chat_model_dir: Path) -> Path:
    """The output of a job that nobody disturbed."""
    output = workplace / "undisturbed"
    done = run(["--model", str(chat_model_dir), "--input", str(dataset), "--output", str(output), *SLOW], workplace)
    assert done.returncode == 0
    assert "finished: 240 rows (2 with an error)" in done.stdout
    return output
