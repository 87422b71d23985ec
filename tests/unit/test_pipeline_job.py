"""Job configuration: sources override one another in the stated order, and every mistake is one line with its remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from nanovllm import UserError
from pipelines.job import DEMO_OUTPUT, build, load

PATHS = ["--model", "m", "--input", "i", "--output", "o"]


def test_later_sources_win(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        "model: from-file\ninput: s3://bucket/in\noutput: out\n"
        'sampling: {temperature: 0.5, max_tokens: 7, stop: ["\\n"]}\nrun: {replicas: [1, 4]}\n'
    )
    config = load(["--config", str(job), "sampling.max_tokens=9", "model=from-override", "--model", "from-flag"]).config
    assert config.model == "from-flag"
    assert config.engine.model == "from-flag"
    assert config.input == "s3://bucket/in"
    assert config.output == str(Path("out").absolute())
    assert (config.sampling.temperature, config.sampling.max_tokens, config.sampling.stop) == (0.5, 9, ["\n"])
    assert config.run.replicas == (1, 4)
    assert load(["--config", str(job), "model=from-override"]).config.model == "from-override"


def test_what_is_printed_can_be_read_again() -> None:
    config = load(
        [*PATHS, "engine.dtype=float32", "run.replicas=3", "columns.keep=[id]", "sampling.stop=[a, b]"]
    ).config
    assert build(yaml.safe_load(config.as_yaml())) == config
    assert build(config.as_dict()) == config


def test_structures_and_labels_come_back_as_they_were() -> None:
    schema = {
        "type": "object",
        "properties": {"b": {"type": "string"}, "a": {"enum": ["1", None, 2]}},
        "required": ["b"],
    }
    for sampling in (
        {"structured_outputs": {"json": schema}},
        {"structured_outputs": {"choice": ["yes", "no"], "disable_any_whitespace": False}},
        {"labels": ["no", "yes"], "logit_bias": {5: -1.5}},
        {"n": 3, "logprobs": 2, "prompt_logprobs": 0},
    ):
        config = build(
            {"model": "m", "input": "i", "output": "o", "sampling": sampling, "columns": {"samples": "rows"}}
        )
        for again in (build(yaml.safe_load(config.as_yaml())), build(json.loads(json.dumps(config.as_dict())))):
            assert again == config
            # Properties are generated in their order.
            assert json.dumps(again.as_dict()) == json.dumps(config.as_dict())
            if config.sampling.structure is not None:
                assert again.sampling.structure == config.sampling.structure
                assert again.sampling.structure.key == config.sampling.structure.key


def test_overrides_may_stand_between_flags() -> None:
    command = load(
        ["--model", "m", "run.seed=3", "--input", "i", "--dry-run", "engine.max_num_seqs=4", "--output", "o"]
    )
    assert command.dry_run
    assert command.config.run.seed == 3
    assert command.config.engine.max_num_seqs == 4


def test_the_flag_quiet_is_a_setting() -> None:
    usual = ["--model", "m", "--input", "i", "--output", "o"]
    assert not load(usual).config.run.quiet
    assert load([*usual, "--quiet"]).config.run.quiet
    assert load([*usual, "run.quiet=false", "--quiet"]).config.run.quiet


def test_demo_needs_nothing_else() -> None:
    command = load(["--demo"])
    assert command.demo
    assert command.config.output == str(Path(DEMO_OUTPUT).absolute())
    assert command.config.sampling.temperature == 0
    assert load(["--demo", "--output", "elsewhere"]).config.output == str(Path("elsewhere").absolute())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run.replica=3"], "unknown job config 'run.replica': did you mean 'replicas'?"),
        (["sampling.max_token=3"], "unknown job config 'sampling.max_token': did you mean 'max_tokens'?"),
        (["engine.dtyp=float32"], "unknown job config 'engine.dtyp': did you mean 'dtype'?"),
        (["prompts.column=x"], "unknown job config 'prompts': did you mean 'prompt'?"),
        (["engine.model=x"], "unknown job config 'engine.model': set the top-level 'model'"),
        (["sampling.seed=1"], "unknown job config 'sampling.seed': set 'run.seed'"),
        (["--modle=x"], "unknown flag '--modle=x': did you mean '--model'?"),
        (["sampling.max_tokens=0"], "sampling.max_tokens=0: must be a whole number of 1 or more"),
        (["sampling.max_tokens=-5"], "sampling.max_tokens=-5: must be a whole number of 1 or more"),
        (["sampling.temperature=nan"], "sampling.temperature=nan: must be a finite number of 0 (greedy) or more"),
        (["sampling.temperature=.nan"], "sampling.temperature=nan: must be a finite number of 0 (greedy) or more"),
        (["sampling.temperature=-1"], "sampling.temperature=-1.0: must be a finite number of 0 (greedy) or more"),
        (["sampling.structured_outputs={chioce: [a, b]}"], "'chioce' in structured_outputs: did you mean 'choice'?"),
        (["sampling.structured_outputs={json: '{'}"], "sampling.json='{': is no JSON"),
        (["sampling.labels=[a]"], "sampling.labels=['a']: must be 2 or more strings"),
        (["sampling.n=2", "sampling.temperature=0"], "sampling.n=2: with temperature=0 all samples are the same"),
        (["columns.samples=column"], "columns.samples='column'"),
        (["run.dedupe=true"], "run.dedupe is for greedy jobs"),
        (["engine.dtype=int3"], "engine.dtype='int3': input should be 'auto'"),
        (["engine.kvcache_block_size=100"], "use 16, 32, 64, 128 or 256"),
        (["run.replicas=[3, 1]"], "must be a number of actors of at least 1, [min,max], or auto"),
        (["run.replicas=0"], "must be a number of actors of at least 1, [min,max], or auto"),
        (["prompt.too_long=cut"], "'error', 'truncate_left' or 'truncate_right'"),
        (["run=3"], "run=3"),
        (["engine=3"], "engine=3"),
        (["sampling=3"], "sampling=3"),
        (["max_tokens"], "'max_tokens' is no setting: write section.key=value"),
        (["model.x=1", "run.seed=: ["], "is not YAML"),
        (["--config", "missing.yaml"], "cannot read the job file 'missing.yaml'"),
        (["--model"], "expected one argument"),
        (["--model", ""], "'model' is empty"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load([*PATHS, *arguments])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(UserError, match="'input' is required"):
        load(["--model", "m", "--output", "o"])


@pytest.mark.parametrize(("text", "message"), [("- a\n", "must hold a mapping"), ("a: [", "is not YAML")])
def test_broken_job_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load(["--config", str(tmp_path / "job.yaml")])
    assert "\n" not in str(caught.value)
