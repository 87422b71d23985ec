"""The configuration of a job: one frozen `JobConfig`, filled from a YAML file, `section.key=value` overrides and flags.

`generate.py` builds it with `load`, every other module reads it, and nothing else holds a setting of the job.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from cluster.placement import Group, check_selector
from nanovllm import EngineConfig, SamplingParams, UserError
from nanovllm.utils.chat import check_template_variables
from nanovllm.utils.validation import parse, suggest
from pipelines.dedupe import check_dedupe
from pipelines.inputs import BATCH_SCHEMA, Format
from pipelines.storage import absolute

TooLong = Literal["error", "truncate_left", "truncate_right"]

DEMO_DIRECTORY = Path(__file__).parent / "demo"
DEMO_CONFIG = Path(__file__).parent / "jobs" / "generate.yaml"
DEMO_OUTPUT = "demo_output"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class PromptConfig(_Section):
    """Where a row's prompt comes from: one of `column`, `messages` and `template`. See `pipelines.prompts`."""

    column: str | None = Field(
        default="prompt",
        description="Column that holds the prompt: a string, or a list of token ids. null where messages or a template are given.",
    )
    messages: str | None = Field(
        default=None,
        description="Column that holds a conversation: a list of structs with role and content, or the same as JSON text.",
    )
    template: str | None = Field(
        default=None, description="Jinja template of the prompt; the row's columns are its variables."
    )
    template_file: str | None = Field(default=None, description="File that holds the template.")
    chat: bool = Field(
        default=False,
        description="Put the text of column or template through the chat template, as a user's turn. messages imply it.",
    )
    system: str | None = Field(
        default=None, description="System message, before all others; a row's own system message takes its place."
    )
    few_shot: list[dict[str, str]] | None = Field(
        default=None,
        description="Turns put before the row's own: {user: ..., assistant: ...} pairs, or messages {role: ..., content: ...}.",
    )
    chat_template: str | None = Field(default=None, description="Chat template used instead of the model's own.")
    chat_template_file: str | None = Field(default=None, description="File that holds the chat template.")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Variables of the chat template, for example {enable_thinking: false}."
    )
    add_generation_prompt: bool = Field(
        default=True, description="End a conversation with the beginning of the assistant's turn."
    )
    too_long: TooLong = Field(
        default="error",
        description="A prompt that does not fit: error makes it an error row; truncate_left drops tokens at its start, "
        "truncate_right at its end, so that prompt and max_tokens fit together.",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_source(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("column") is not None:
            return values
        others = any(values.get(name) is not None for name in ("messages", "template", "template_file"))
        return {**values, "column": None if others else "prompt"}

    @property
    def uses_chat(self) -> bool:
        """Whether prompts go through a chat template."""
        return self.chat or self.messages is not None


class ColumnsConfig(_Section):
    """Which columns the output has."""

    prefix: str = Field(default="", description="Put before the name of every generated column.")
    keep: list[str] | None = Field(
        default=None, description="Input columns to carry into the output; all where not given."
    )
    samples: Literal["list", "rows"] = Field(
        default="list",
        description="With sampling.n above 1: list makes the columns of a sample lists of n values; rows makes n rows of each "
        "input row, with sample_index from 0 and the input columns repeated.",
    )
    num_cached_tokens: bool = Field(
        default=False,
        description="Add num_cached_tokens. It tells what one attempt reused, so with it a resumed job's files differ.",
    )


def _replicas(value: Any) -> Any:
    """One message for all the ways to get `run.replicas` wrong, where a union would give three."""
    if value == "auto":
        return value
    ends = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if len(ends) == 2 and all(type(end) is int for end in ends) and 1 <= ends[0] <= ends[1]:
        return tuple(ends)
    raise ValueError("must be a number of actors of at least 1, [min,max], or auto")


def _shard_rows(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise ValueError("must be a number of rows of at least 1, or auto")


def _switch(value: Any) -> Any:
    """YAML reads on and off as booleans."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


def _node_directory(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value.startswith(("/", "~"))):
        return value
    raise ValueError("must be an absolute path, since it is one on every node")


def _labels(selector: dict[str, str] | None) -> dict[str, str] | None:
    if selector is not None:
        check_selector(selector)
    return selector


def _fallbacks(selectors: list[dict[str, str]]) -> list[dict[str, str]]:
    for selector in selectors:
        check_selector(selector)
    return selectors


class RunConfig(_Section):
    """How the job runs. Only `seed` changes its results."""

    seed: int = Field(
        default=0, ge=0, lt=2**63, description="With the row's file and position it decides the row's sampling."
    )
    dedupe: bool = Field(
        default=False,
        description="Generate equal rows (prompt and parameters) of a greedy job once for each engine and copy the result. An "
        "engine remembers the last 128 MiB of results.",
    )
    replicas: Annotated[Literal["auto"] | tuple[int, int], BeforeValidator(_replicas)] = Field(
        default="auto",
        description="Engine actors: a number, [min,max], or auto (one for each GPU or group of tensor_parallel_size "
        "GPUs; one where there is no GPU).",
    )
    num_gpus: float | None = Field(
        default=None, ge=0, description="GPUs of an actor; where not given, tensor_parallel_size on GPUs and 0 on CPUs."
    )
    num_cpus: float = Field(
        default=0,
        ge=0,
        description="CPUs Ray reserves for an actor; where its ranks are on several nodes, for each rank.",
    )
    group: Group = Field(
        default="auto",
        description="Where the tensor-parallel ranks of an engine may be: on one node, or anywhere in the cluster, on as few nodes as "
        "have room. auto: on one node where one has GPUs enough for them, else in the cluster.",
    )
    label_selector: Annotated[dict[str, str] | None, AfterValidator(_labels)] = Field(
        default=None,
        description="Labels of the nodes that engines run on, as Ray has them: {ray.io/accelerator-type: H200}; a value may be !value, "
        "in(a,b) or !in(a,b).",
    )
    label_fallbacks: Annotated[list[dict[str, str]], AfterValidator(_fallbacks)] = Field(
        default_factory=list,
        description="Further selectors, tried in this order where no node of label_selector has room.",
    )
    shard_rows: Annotated[Literal["auto"] | int, BeforeValidator(_shard_rows)] = Field(
        default="auto",
        description="Most rows of a shard, the unit of commit (a quarter more where a row group ends); fewer at the job's "
        "end. auto: 1000, more where that would be over 20,000 shards (at most 32,768), and fewer where rows are so heavy "
        "that a shard would pass 256 MiB uncompressed. JSONL and CSV are cut every 16 rows, and where a MiB of text ends.",
    )
    shards_in_flight: int = Field(
        default=8, ge=1, description="Shards an actor works on at a time; of few, no more than its share."
    )
    group_by: str | None = Field(
        default=None,
        description="Column whose equal values mark rows that share a prefix: they are brought together, so that one engine computes it.",
    )
    prefix_sort: Annotated[Literal["off", "on", "auto"], BeforeValidator(_switch)] = Field(
        default="off",
        description="Bring rows together whose prompts begin alike. auto: where a sample of rows says that it saves more than it costs.",
    )
    journal_flush_s: float = Field(
        default=5.0, gt=0, description="Seconds between flushes of finished rows to the journal."
    )
    write_retries: int = Field(
        default=6, ge=0, description="Retries of a failing request to a store, 1 s after the first, then doubling."
    )
    lease_s: float = Field(
        default=10.0,
        ge=1,
        description="Life of the lease on the output: how long a start watches a dead one elsewhere before it takes over.",
    )
    max_engine_deaths: int = Field(
        default=10,
        ge=1,
        description="Engine deaths on a shard, with no row of it finished in between, after which it is given up as failed. "
        "A prompt that kills costs at most 8.",
    )
    hang_s: float = Field(
        default=60.0,
        ge=2,
        description="An actor that is not heard of for so long is killed and replaced; one whose engine makes no step, after "
        "10 times as long.",
    )
    model_cache: Annotated[str | None, BeforeValidator(_node_directory)] = Field(
        default=None,
        description="Directory of each node for models that are no local directory; where not given, nanovllm/models in the user's "
        "cache directory (XDG_CACHE_HOME), and the hub's own (HF_HOME) for hub ids.",
    )
    progress_s: float = Field(
        default=5.0, gt=0, description="Seconds between progress lines where stdout is no terminal."
    )
    quiet: bool = Field(
        default=False, description="Print nothing but the last line, and errors; the same as the flag --quiet."
    )

    @model_validator(mode="after")
    def _first_choice(self) -> RunConfig:
        if self.label_fallbacks and self.label_selector is None:
            raise ValueError("label_fallbacks need the label_selector that they stand in for")
        return self

    @model_validator(mode="after")
    def _one_route(self) -> RunConfig:
        if self.group_by is not None and self.prefix_sort != "off":
            raise ValueError("group_by and prefix_sort both say which rows go together; leave one out")
        return self

    @property
    def may_route(self) -> bool:
        """Whether rows may run in another order than that of the input."""
        return self.group_by is not None or self.prefix_sort != "off"

    @property
    def selectors(self) -> list[dict[str, str]]:
        """Label selectors in the order they are tried; none: engines run on any node."""
        return [] if self.label_selector is None else [self.label_selector, *self.label_fallbacks]


class JobConfig(_Section):
    """A whole job. Built by `load` or `build`, which report mistakes as a one-line `UserError`."""

    model: str = Field(
        description="Directory with config.json and safetensors, a hub id, or an address of such a directory (s3://, gs:// and so on)."
    )
    input: str = Field(description="Parquet, JSONL or CSV: a file, directory or glob; local, s3://, gs:// and so on.")
    output: str = Field(description="Directory for the result; local paths must be visible to every node.")
    output_order: Literal["input", "any"] = Field(
        default="input",
        alias="output.order",
        description="Of the rows in the output where run.group_by or run.prefix_sort changes the order they run in: that of the input, or "
        "any, which saves the pass that restores it.",
    )
    format: Literal["auto", Format] = Field(
        default="auto",
        description="Of the input; auto: by the names of its files. openai_batch: JSONL of OpenAI's batch API, answered in "
        "_results.jsonl.",
    )
    prompt: PromptConfig = PromptConfig()
    sampling: SamplingParams = Field(default_factory=SamplingParams)
    sampling_columns: dict[str, str] = Field(
        default_factory=dict,
        description="Sampling parameters of single rows: parameter -> column that holds it; null is the job's value.",
    )
    sampling_column: str | None = Field(
        default=None, description="Column of structs, or of JSON text, whose fields are a row's sampling parameters."
    )
    columns: ColumnsConfig = ColumnsConfig()
    engine: EngineConfig
    run: RunConfig = RunConfig()

    def as_dict(self) -> dict[str, Any]:
        """Plain values that `build` turns back into an equal configuration."""
        return self.model_dump(mode="json", by_alias=True, exclude={"engine": {"model"}, "sampling": {"seed"}})

    def as_yaml(self) -> str:
        """What `--print-config` prints; usable as `--config`."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)


def build(data: Mapping[str, Any]) -> JobConfig:
    """Check `data`, nested as in a job file, and build the configuration.

    Raises:
        UserError: an unknown key (the nearest known one is named), a missing one, or a value out of range.
    """
    values = dict(data)
    sampling = values.get("sampling") or {}
    engine = values.get("engine") or {}
    if isinstance(sampling, Mapping):
        _check_sampling_keys(sampling)
    if isinstance(engine, Mapping):
        if "model" in engine:
            raise UserError("unknown job config 'engine.model': set the top-level 'model'")
        values["engine"] = {**engine, "model": values.get("model", "")}
    if isinstance(values.get("prompt"), Mapping):
        values["prompt"] = read_prompt_files(values["prompt"])
    config = parse(JobConfig, {key: value for key, value in values.items() if value is not None}, "job config")
    if config.format == "openai_batch":
        config = _for_batch(config, isinstance(sampling, Mapping) and "max_tokens" in sampling)
    problem = config.sampling.problem()
    if problem is not None:
        raise UserError(f"job config sampling.{problem}")
    check_prompt(config.prompt, config.format)
    if config.run.dedupe:
        check_dedupe("run.dedupe", config.sampling)
    if config.output_order == "any":
        _check_any_order(config)
    for name in ("model", "input", "output"):
        if not getattr(config, name):
            raise UserError(f"job config {name!r} is empty; give it a path")
    return config


def _check_any_order(config: JobConfig) -> None:
    """Refuse an order that nothing changes, or that something needs.

    Raises:
        UserError: naming the setting.
    """
    if not config.run.may_route:
        raise UserError(
            "output.order=any is for jobs with run.group_by or run.prefix_sort, and this one has neither; leave it out"
        )
    if config.format == "openai_batch":
        raise UserError(
            "output.order=any has no meaning with format=openai_batch, whose answers stand in the order of the input; leave it out"
        )


def _for_batch(config: JobConfig, max_tokens_given: bool) -> JobConfig:
    """The configuration of a job over requests of OpenAI's batch API: they may go on to the end of the model.

    Raises:
        UserError: answers need columns that are not kept.
    """
    missing = [name for name in BATCH_SCHEMA.names if name not in (config.columns.keep or BATCH_SCHEMA.names)]
    if missing:
        raise UserError(
            f"columns.keep lacks {missing[0]!r}, which answers are made of with format=openai_batch; add it"
        )
    if max_tokens_given:
        return config
    sampling = dataclasses.replace(config.sampling, max_tokens=config.engine.max_model_len)
    return config.model_copy(update={"sampling": sampling})


def read_prompt_files(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """The section `prompt` with the content of its files in their place: other machines have no such files.

    Raises:
        UserError: a file cannot be read, or is given beside what it should hold.
    """
    values = dict(prompt)
    for name in ("template", "chat_template"):
        path = values.pop(f"{name}_file", None)
        if path is None:
            continue
        if values.get(name) is not None:
            raise UserError(f"prompt.{name} and prompt.{name}_file are both given; leave one out")
        try:
            values[name] = Path(str(path)).expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"prompt.{name}_file {str(path)!r} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"prompt.{name}_file {str(path)!r} is not UTF-8 text") from None
    return values


def check_prompt(prompt: PromptConfig, input_format: str = "auto") -> None:
    """Refuse settings of a prompt that do not go together, whatever the input's columns are.

    Raises:
        UserError: naming them.
    """
    if input_format == "openai_batch":
        allowed = {"chat_template", "chat_template_kwargs", "too_long"}
        usual = PromptConfig()
        given = [name for name, value in prompt if name not in allowed and value not in (None, getattr(usual, name))]
        if given:
            raise UserError(
                f"prompt.{given[0]} has no meaning with format=openai_batch: prompts are in the requests' bodies; leave it out"
            )
        return
    sources = [name for name in ("column", "messages", "template") if getattr(prompt, name) is not None]
    if len(sources) > 1:
        raise UserError(
            f"prompt.{sources[0]} and prompt.{sources[1]} are both given; a prompt comes from one of column, messages and template"
        )
    for turn in prompt.few_shot or ():
        if set(turn) not in ({"user", "assistant"}, {"role", "content"}):
            raise UserError(
                f"prompt.few_shot has {turn!r}; give {{user: ..., assistant: ...}} pairs or messages {{role: ..., content: ...}}"
            )
    check_template_variables(prompt.chat_template_kwargs)
    for name in ("system", "few_shot", "chat_template", "chat_template_kwargs", "add_generation_prompt"):
        if not prompt.uses_chat and getattr(prompt, name) != getattr(PromptConfig(), name):
            raise UserError(
                f"prompt.{name} is for chats, and this prompt is plain text; set prompt.chat=true, or leave it out"
            )


def _check_sampling_keys(sampling: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(SamplingParams)} - {"seed"}
    for key in sampling:
        if key == "seed":
            raise UserError("unknown job config 'sampling.seed': set 'run.seed', from which every row's seed follows")
        if key not in known:
            raise UserError(f"unknown job config 'sampling.{key}': {suggest(str(key), known)}")


@dataclasses.dataclass(frozen=True)
class Command:
    """What the command line asks for."""

    config: JobConfig
    print_config: bool
    dry_run: bool
    demo: bool
    address: str | None = None


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as a `UserError`, so that the command prints one line for every refusal."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def load(arguments: Sequence[str]) -> Command:
    """Read the command line. Later sources win: the job file, then `section.key=value`, then the three flags.

    Raises:
        UserError: as `build`, and for an unreadable job file or a malformed override.
    """
    parser = _Parser(
        prog="generate.py",
        description="Generate text for every row of a dataset: Parquet in, Parquet out, every row exactly once.",
        epilog="Any setting: section.key=value with a YAML value, for example sampling.max_tokens=128 "
        "run.replicas=[1,8] engine.dtype=bfloat16. --print-config lists them all.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", help="model directory, local or remote, or hub id")
    parser.add_argument("--input", help="Parquet, JSONL or CSV: a file, directory or glob, local or remote")
    parser.add_argument("--output", help="directory for the result")
    parser.add_argument("--config", help="job file in YAML; see pipelines/jobs/")
    parser.add_argument(
        "--address", help="cluster to run on: auto, or host:port of its head; else RAY_ADDRESS, or a Ray of its own"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--dry-run", action="store_true", help="check everything, show 3 prompts, start no engine")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the last line, and errors")
    parser.add_argument("--demo", action="store_true", help="run on the bundled model and prompts")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any setting of the job")
    options, unknown = parser.parse_known_intermixed_args(list(arguments))
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        raise UserError(f"unknown flag {unknown[0]!r}: {suggest(unknown[0].split('=')[0], flags)}")

    path = options.config or (DEMO_CONFIG if options.demo else None)
    values = _read_job_file(Path(path)) if path else {}
    if options.demo and not options.config:
        values.update(model=str(DEMO_DIRECTORY / "model"), input=str(DEMO_DIRECTORY / "prompts.parquet"))
        values["output"] = DEMO_OUTPUT
    # As a section, with the directory from the flag.
    if isinstance(values.get("output"), dict) and "order" in values["output"]:
        values["output.order"] = values["output"].pop("order")
    for override in options.overrides:
        _apply(values, override)
    for name in ("model", "input", "output"):
        if getattr(options, name) is not None:
            values[name] = getattr(options, name)
    if options.quiet:
        _apply(values, "run.quiet=true")
    for name in ("input", "output"):
        if isinstance(values.get(name), str) and values[name]:
            values[name] = absolute(values[name])
    model = values.get("model")
    if isinstance(model, str) and model and ("://" in model or Path(model).exists()):
        values["model"] = absolute(model)
    return Command(build(values), options.print_config, options.dry_run, options.demo, options.address)


def _read_job_file(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the job file {str(path)!r}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the job file {str(path)!r} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"the job file {str(path)!r} must hold a mapping of settings, see pipelines/jobs/generate.yaml")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in nested `values`."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise UserError(f"{override!r} is no setting: write section.key=value, for example sampling.max_tokens=128")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"the value of {override!r} is not YAML; quote it") from None
    *sections, key = [name] if name == "output.order" else name.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"{override!r}: {section!r} is no section")
        values = inner
    values[key] = value
