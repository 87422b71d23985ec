"""What sampling options cost: the same rows and lengths free, constrained by a JSON schema of ten fields, filtered, penalized.

`python bench/sampling_options.py --save sampling_options_gpu`: 256 rows of the 0.6B shape with random weights and a vocabulary of
151,936 tokens. Cases take turns, and each is compared with free rows of the same round that make as many tokens each as its own did: a
constrained row ends where its grammar does.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import SHAPES, save
from grammar import EOS, make_tokenizer

from nanovllm import LLM, RequestOutput, SamplingParams
from nanovllm.structured_outputs import StructuredOutputsParams


def ten_fields(number: int, max_length: int) -> dict[str, Any]:
    """A schema of ten fields, the text of three of which is free; `number` tells it from others."""
    text = {"type": "string", "maxLength": max_length}
    properties: dict[str, Any] = {
        "title": text,
        "summary": text,
        "sentiment": {"enum": ["positive", "negative", "neutral", f"other {number}"]},
        "score": {"type": "integer", "minimum": 0, "maximum": 100},
        "confidence": {"type": "number", "minimum": 0, "maximum": 1},
        "is_question": {"type": "boolean"},
        "language": {"enum": ["en", "de", "fr", "es", "zh"]},
        "date": {"type": "string", "pattern": "^20[0-9]{2}-[01][0-9]-[0-3][0-9]$"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 2, "maxItems": 5},
        "reason": text,
    }
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def case_params(case: str, rows: int, max_length: int) -> list[dict[str, Any]]:
    """The options of each row in a case."""
    if case == "json":
        # One object for all rows, as a job has it: it is looked through once.
        return [{"structured_outputs": StructuredOutputsParams(json=ten_fields(0, max_length))}] * rows
    if case == "json distinct":
        return [{"structured_outputs": {"json": ten_fields(row, max_length)}} for row in range(rows)]
    known: dict[str, dict[str, Any]] = {
        "free": {},
        "filters": {"top_k": 50, "top_p": 0.9, "min_p": 0.01},
        "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        "logprobs": {"logprobs": 5},
    }
    return [known[case]] * rows


CASES = ["json", "json distinct", "filters", "penalties", "logprobs"]


def write_model(shape: str, directory: Path) -> None:
    """The shape's config, and a tokenizer of the size of its vocabulary."""
    size = SHAPES[shape]["vocab_size"]
    tokenizer = make_tokenizer(size)
    tokenizer.save_pretrained(directory)
    config = SHAPES[shape] | {"eos_token_id": tokenizer.convert_tokens_to_ids(EOS)}
    (directory / "config.json").write_text(json.dumps(config))


def run(llm: LLM, case: str, prompts: list[list[int]], lengths: list[int] | None, args: argparse.Namespace) -> Any:
    """Generate the rows of a case once: seconds, steps and outputs. `lengths`: tokens of each row; as the grammar has it where None."""
    params = [
        SamplingParams(
            args.temperature,
            args.max_tokens if lengths is None or case.startswith("json") else lengths[row],
            ignore_eos=not case.startswith("json"),
            seed=row,
            **options,
        )
        for row, options in enumerate(case_params(case, len(prompts), args.max_length))
    ]
    steps, start = llm.steps, time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start, llm.steps - steps, outputs


def check(case: str, outputs: list[RequestOutput]) -> None:
    errors = [output["error"] for output in outputs if output["error"]]
    if errors:
        raise SystemExit(f"{case}: {len(errors)} rows failed, the first with: {errors[0]}")
    if case.startswith("json"):
        unparsed = [output["text"] for output in outputs if output["finish_reason"] == "stop" and not output["parsed"]]
        if unparsed:
            raise SystemExit(f"{case}: {len(unparsed)} rows do not parse, the first: {unparsed[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--num-seqs", type=int, default=256)
    parser.add_argument("--input-len", type=int, nargs=2, default=(100, 1024))
    parser.add_argument("--max-length", type=int, default=300, help="characters of a free text field")
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--warm-up",
        type=int,
        default=3,
        help="rounds before them that do not count: a job has captured its graphs soon",
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    args = parser.parse_args()
    with TemporaryDirectory() as directory:
        write_model(args.shape, Path(directory))
        llm = LLM(directory, load_format="dummy", max_num_seqs=args.num_seqs, max_model_len=4096)
    rng = random.Random(0)
    prompts = [[rng.randrange(10000) for _ in range(rng.randint(*args.input_len))] for _ in range(args.num_seqs)]
    _, _, outputs = run(llm, "json", prompts, None, args)  # also warms up what it uses
    lengths = [output["num_generated_tokens"] for output in outputs]
    rounds: dict[str, list[tuple[float, int, int]]] = {case: [] for case in args.cases}
    ratios: dict[str, list[float]] = {case: [] for case in args.cases}

    def measure(case: str, number: int, wanted: list[int]) -> tuple[float, int, list[int]]:
        seconds, steps, outputs = run(
            llm, case, [[number + args.warm_up + 1, *prompt[1:]] for prompt in prompts], wanted, args
        )
        check(case, outputs)
        made = [output["num_generated_tokens"] for output in outputs]
        print(f"{number}: {case}: {sum(made) / seconds:,.0f} tok/s, {seconds:.3f} s, {steps} steps", flush=True)
        return seconds, steps, made

    for number in range(-args.warm_up, args.rounds):
        measure("free", number, lengths)  # leaves the prompts in the prefix cache for all that follow
        for case in args.cases:
            seconds, steps, made = measure(case, number, lengths)
            if number >= 0:
                free, _, _ = measure("free", number, made)
                rounds[case].append((seconds, steps, sum(made)))
                ratios[case].append(free / seconds)
    llm.exit()
    rows = []
    for case, runs in rounds.items():
        rate = [tokens / seconds for seconds, _, tokens in runs]
        rows.append(
            {
                "case": case,
                "output_tokens_per_s": round(statistics.median(rate)),
                "of_free": round(statistics.median(ratios[case]), 3),
                "seconds": [round(seconds, 3) for seconds, _, _ in runs],
                "steps": runs[0][1],
                "tokens": runs[0][2],
                "ms_a_step": round(statistics.median(1e3 * seconds / steps for seconds, steps, _ in runs), 3),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "benchmark": "sampling_options",
        "shape": args.shape,
        "num_seqs": args.num_seqs,
        "mean_tokens_a_row": round(statistics.mean(lengths), 1),
        "cases": rows,
    }
    if args.save:
        print(save(args.save, result))


if __name__ == "__main__":
    main()
