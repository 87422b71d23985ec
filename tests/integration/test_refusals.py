"""Everything that can be refused is refused in seconds: exit status 2, one line on stderr, nothing left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from pipelines.commit import OutputDirectory
from pipelines.generate import main
from pipelines.inputs import list_dataset, measure
from pipelines.job import load
from pipelines.plan import identity, make_shards
from tests.integration.jobs import GENERATE, environment


class Place:
    """A good job in `root`; a case breaks one thing about it and says what the command must answer."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root = root
        self.model = root / "model"
        self.input = root / "in"
        self.output = root / "out"
        shutil.copytree(model, self.model)
        self.input.mkdir()
        self.write("a.parquet", {"id": [1, 2, 3], "prompt": ["a", "b", "c"]})

    def write(self, name: str, columns: dict[str, list[object]]) -> None:
        pq.write_table(pa.table(columns), self.input / name)

    def arguments(self, *more: str) -> list[str]:
        return ["--model", str(self.model), "--input", str(self.input), "--output", str(self.output), *more]

    def change_weights(self, change: Callable[[dict[str, object]], object]) -> None:
        path = self.model / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    def begin(self, *more: str) -> None:
        """Begin the job as `generate.py` does before it starts engines."""
        config = load(self.arguments(*more)).config
        dataset = list_dataset(config.input)
        schema, facts = measure(dataset)
        shards = make_shards(config, dataset.files, facts)
        OutputDirectory(config.output).create(identity(config, dataset), dataset.format, schema, shards, dataset.files)


@pytest.fixture
def place(tmp_path: Path, chat_model_dir: Path) -> Place:
    return Place(tmp_path, chat_model_dir)


def case(name: str, *expected: str) -> Callable[[Callable[[Place], list[str]]], Callable[[Place], list[str]]]:
    def register(break_it: Callable[[Place], list[str]]) -> Callable[[Place], list[str]]:
        CASES[name] = (break_it, expected)
        return break_it

    return register


CASES: dict[str, tuple[Callable[[Place], list[str]], tuple[str, ...]]] = {}


@case("rows grouped by no column", "input has no column 'promt' (run.group_by): did you mean 'prompt'?")
def _(place: Place) -> list[str]:
    return place.arguments("run.group_by=promt")


@case("any order where nothing changes it", "output.order=any is for jobs with run.group_by or run.prefix_sort")
def _(place: Place) -> list[str]:
    return place.arguments("output.order=any")


@case("input missing", "'/", "does not exist")
def _(place: Place) -> list[str]:
    shutil.rmtree(place.input)
    return place.arguments()


@case("input directory empty", "holds no data files")
def _(place: Place) -> list[str]:
    (place.input / "a.parquet").unlink()
    return place.arguments()


@case("glob matches nothing", "holds no data files")
def _(place: Place) -> list[str]:
    return place.arguments("--input", str(place.input / "*.csv"))


@case("input without rows", "no rows")
def _(place: Place) -> list[str]:
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), place.input / "a.parquet")
    return place.arguments()


@case("input file of no bytes", "'a.parquet' is not readable parquet")
def _(place: Place) -> list[str]:
    (place.input / "a.parquet").write_bytes(b"")
    return place.arguments()


@case("footer cut off", "'b.parquet' is not readable parquet")
def _(place: Place) -> list[str]:
    (place.input / "b.parquet").write_bytes((place.input / "a.parquet").read_bytes()[:-20])
    return place.arguments()


@case("broken JSON", "'a.jsonl' is not readable jsonl")
def _(place: Place) -> list[str]:
    (place.root / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    return place.arguments("--input", str(place.root / "a.jsonl"))


@case("two formats", "mixes formats")
def _(place: Place) -> list[str]:
    (place.input / "b.csv").write_text("prompt\na\n")
    return place.arguments()


@case("unknown kind of file", "'x.xlsx'", "known endings")
def _(place: Place) -> list[str]:
    (place.input / "x.xlsx").write_bytes(b"PK")
    return place.arguments()


@case("no file system for the address", "no file system for 'nowhere://x/y'")
def _(place: Place) -> list[str]:
    return place.arguments("--input", "nowhere://x/y")


@case("prompt column missing", "no column 'promt'", "did you mean 'prompt'?")
def _(place: Place) -> list[str]:
    return place.arguments("prompt.column=promt")


@case("prompt column of another type", "'id' (prompt.column) is int64; prompts are strings")
def _(place: Place) -> list[str]:
    return place.arguments("prompt.column=id")


@case("column name taken", "already has a column 'error'", "columns.prefix")
def _(place: Place) -> list[str]:
    place.write("a.parquet", {"prompt": ["a"], "error": ["b"]})
    return place.arguments()


@case("column to keep missing", "columns.keep names 'idd'", "it has id, prompt")
def _(place: Place) -> list[str]:
    return place.arguments("columns.keep=[idd]")


@case("max_tokens of 0", "max_tokens=0", "1 or more")
def _(place: Place) -> list[str]:
    return place.arguments("sampling.max_tokens=0")


@case("negative max_tokens", "max_tokens=-3", "1 or more")
def _(place: Place) -> list[str]:
    return place.arguments("sampling.max_tokens=-3")


@case("temperature not a number", "temperature=nan", "finite")
def _(place: Place) -> list[str]:
    return place.arguments("sampling.temperature=.nan")


@case("unknown key", "'sampling.max_token'", "did you mean 'max_tokens'?")
def _(place: Place) -> list[str]:
    return place.arguments("sampling.max_token=3")


@case("no room to truncate to", "max_tokens=64 leaves no room", "engine.max_model_len")
def _(place: Place) -> list[str]:
    return place.arguments("prompt.too_long=truncate_left", "engine.max_model_len=64", "sampling.max_tokens=64")


@case("model directory missing", "does not exist")
def _(place: Place) -> list[str]:
    shutil.rmtree(place.model)
    return place.arguments()


@case("model without weights", "safetensors")
def _(place: Place) -> list[str]:
    (place.model / "model.safetensors").unlink()
    return place.arguments()


@case("weights cut off", "model.safetensors")
def _(place: Place) -> list[str]:
    path = place.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return place.arguments()


@case("tensor missing", "model.norm.weight")
def _(place: Place) -> list[str]:
    place.change_weights(lambda tensors: tensors.pop("model.norm.weight"))
    return place.arguments()


@case("tensor too many", "model.extra.weight")
def _(place: Place) -> list[str]:
    place.change_weights(lambda tensors: tensors.update({"model.extra.weight": tensors["model.norm.weight"].clone()}))  # type: ignore[attr-defined]
    return place.arguments()


@case("unknown architecture", "MambaForCausalLM", "Qwen3ForCausalLM")
def _(place: Place) -> list[str]:
    path = place.model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["MambaForCausalLM"]}))
    return place.arguments()


@case("a schema that cannot be compiled", "structured_outputs json cannot be compiled", "uniqueItems")
def _(place: Place) -> list[str]:
    return place.arguments("sampling.structured_outputs={json: {type: array, uniqueItems: true}}")


@case("a schema that cannot be compiled, before a dry run", "structured_outputs regex cannot be compiled")
def _(place: Place) -> list[str]:
    return place.arguments('sampling.structured_outputs={regex: "(?<=a)b"}', "--dry-run")


@case("a grammar that is none", "structured_outputs grammar cannot be compiled")
def _(place: Place) -> list[str]:
    return place.arguments('sampling.structured_outputs={grammar: "start: NOWHERE"}')


@case("labels that cannot be told apart", "labels", "none of them twice")
def _(place: Place) -> list[str]:
    return place.arguments("sampling.labels=[a, a]")


@case("a token that the model lacks", "allowed_token_ids holds 99999", "not a token id of this model")
def _(place: Place) -> list[str]:
    return place.arguments("sampling.allowed_token_ids=[99999]")


@case("a column of labels whose name is taken", "already has a column 'label'", "columns.prefix")
def _(place: Place) -> list[str]:
    place.write("a.parquet", {"prompt": ["a"], "label": ["b"]})
    return place.arguments("sampling.labels=[a, b]")


@case("no tokenizer", "no tokenizer", "tokenizer.json")
def _(place: Place) -> list[str]:
    (place.model / "tokenizer.json").unlink()
    (place.model / "tokenizer_config.json").unlink()
    return place.arguments()


@case("ranks that do not divide", "tensor_parallel_size=3", "does not divide")
def _(place: Place) -> list[str]:
    return place.arguments("engine.tensor_parallel_size=3")


@case("no GPU", "engine.device=cuda", "engine.device=auto or cpu")
def _(place: Place) -> list[str]:
    return place.arguments("engine.device=cuda")


@case("output of another job", "belongs to another job: sampling.temperature was 1.0, is 0.5", "new output directory")
def _(place: Place) -> list[str]:
    place.begin()
    return place.arguments("sampling.temperature=0.5")


@case("output of a job with other input", "belongs to another job: input file 'b.parquet' is new")
def _(place: Place) -> list[str]:
    place.begin()
    place.write("b.parquet", {"id": [4], "prompt": ["d"]})
    return place.arguments()


@case("output of somebody else", "is not empty and holds no job (found 'thesis.doc')")
def _(place: Place) -> list[str]:
    place.output.mkdir()
    (place.output / "thesis.doc").write_text("x")
    return place.arguments()


@case("output is a file", "is a file; give a directory")
def _(place: Place) -> list[str]:
    place.output.write_text("x")
    return place.arguments()


@case("output is the input", "holds the input file 'a.parquet'")
def _(place: Place) -> list[str]:
    return place.arguments("--output", str(place.input))


@case("output around the input", "holds the input file 'a.parquet'")
def _(place: Place) -> list[str]:
    return place.arguments("--output", str(place.root))


@case("output inside the input", "is inside the input")
def _(place: Place) -> list[str]:
    return place.arguments("--output", str(place.input / "out"))


@case("output is the input by another name", "holds the input file 'a.parquet'")
def _(place: Place) -> list[str]:
    (place.root / "alias").symlink_to(place.input)
    return place.arguments("--output", str(place.root / "alias"))


@case("output cannot be made", "cannot be written")
def _(place: Place) -> list[str]:
    (place.root / "file").write_text("x")
    return place.arguments("--output", str(place.root / "file" / "out"))


@case("a chat and a model without a chat template", "has no chat template; give one (chat_template, chat_template_file")
def _(place: Place) -> list[str]:
    config = json.loads((place.model / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (place.model / "tokenizer_config.json").write_text(json.dumps(config))
    return place.arguments("prompt.chat=true")


@case("a chat template that is not Jinja", "the chat template is not Jinja")
def _(place: Place) -> list[str]:
    (place.root / "chat.jinja").write_text("{% for m in messages %}")
    return place.arguments("prompt.chat=true", f"prompt.chat_template_file={place.root / 'chat.jinja'}")


@case(
    "a template over a column that is not there",
    "prompt.template uses 'promt', which is no column: did you mean 'prompt'",
)
def _(place: Place) -> list[str]:
    return place.arguments("prompt.template='{{ promt }}'")


@case("a parameter of rows that is none", "unknown sampling parameter 'max_token': did you mean 'max_tokens'?")
def _(place: Place) -> list[str]:
    return place.arguments("sampling_columns.max_token=id")


@case("rows with their own number of samples", "'n' is the same for all rows of a job; set sampling.n")
def _(place: Place) -> list[str]:
    return place.arguments("sampling_columns.n=id")


@case("Parquet as requests of OpenAI", "'a.parquet' is named as parquet, and format=openai_batch was given")
def _(place: Place) -> list[str]:
    return place.arguments("format=openai_batch")


@case("another prompt than the job was begun with", "prompt.template was '{{ prompt }}', is '{{ prompt }}?'")
def _(place: Place) -> list[str]:
    place.begin("prompt.template='{{ prompt }}'")
    return place.arguments("prompt.template='{{ prompt }}?'")


def snapshot(root: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))}


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, place: Place, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    break_it, expected = CASES[name]
    arguments = break_it(place)
    before = snapshot(place.root)
    status = main(arguments)
    out, err = capfd.readouterr()
    assert status == 2, out + err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for words in expected:
        assert words in err
    assert out == ""
    assert snapshot(place.root) == before


def test_a_refusal_is_one_line_of_a_real_process_within_seconds(place: Place) -> None:
    (place.model / "model.safetensors").unlink()
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(GENERATE), *place.arguments()],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert time.monotonic() - began < 30


def test_print_config_needs_no_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "m", "--input", "i", "--output", "o", "--print-config", "run.seed=4"]) == 0
    assert "seed: 4" in capsys.readouterr().out
