"""nano-vllm's own `example.py` and `bench.py`, word for word, run as programs against a tiny model under $HOME."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.models import make_model

ROOT = Path(__file__).resolve().parents[2]

EXAMPLE = """\
import os
from nanovllm import LLM, SamplingParams
from transformers import AutoTokenizer


def main():
    path = os.path.expanduser("~/huggingface/Qwen3-0.6B/")
    tokenizer = AutoTokenizer.from_pretrained(path)
    llm = LLM(path, enforce_eager=True, tensor_parallel_size=1)

    sampling_params = SamplingParams(temperature=0.6, max_tokens=256)
    prompts = [
        "introduce yourself",
        "list all prime numbers within 100",
    ]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True
        )
        for prompt in prompts
    ]
    outputs = llm.generate(prompts, sampling_params)

    for prompt, output in zip(prompts, outputs):
        print("\\n")
        print(f"Prompt: {prompt!r}")
        print(f"Completion: {output['text']!r}")


if __name__ == "__main__":
    main()
"""

BENCH = """\
import os
import time
from random import randint, seed
from nanovllm import LLM, SamplingParams
# from vllm import LLM, SamplingParams


def main():
    seed(0)
    num_seqs = 256
    max_input_len = 1024
    max_ouput_len = 1024

    path = os.path.expanduser("~/huggingface/Qwen3-0.6B/")
    llm = LLM(path, enforce_eager=False, max_model_len=4096)

    prompt_token_ids = [[randint(0, 10000) for _ in range(randint(100, max_input_len))] for _ in range(num_seqs)]
    sampling_params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=randint(100, max_ouput_len)) for _ in range(num_seqs)]
    # uncomment the following line for vllm
    # prompt_token_ids = [dict(prompt_token_ids=p) for p in prompt_token_ids]

    llm.generate(["Benchmark: "], SamplingParams())
    t = time.time()
    llm.generate(prompt_token_ids, sampling_params, use_tqdm=False)
    t = (time.time() - t)
    total_tokens = sum(sp.max_tokens for sp in sampling_params)
    throughput = total_tokens / t
    print(f"Total: {total_tokens}tok, Time: {t:.2f}s, Throughput: {throughput:.2f}tok/s")


if __name__ == "__main__":
    main()
"""


def run_program(text: str, home: Path) -> str:
    # As upstream's model: more rows than the tokenizer has tokens, and ids up to 10,000 are valid.
    make_model(
        home / "huggingface" / "Qwen3-0.6B",
        tokenizer=True,
        vocab_size=10240,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    program = home / "program.py"
    program.write_text(text)
    environment = dict(os.environ, HOME=str(home), PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, env=environment, cwd=home, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_example(tmp_path: Path) -> None:
    lines = run_program(EXAMPLE, tmp_path).splitlines()
    assert sum(line.startswith("Prompt: '<|im_start|>user\\n") for line in lines) == 2
    completions = [line for line in lines if line.startswith("Completion: ")]
    assert len(completions) == 2
    assert completions[0] != completions[1]


def test_bench(tmp_path: Path) -> None:
    small = BENCH.replace("num_seqs = 256", "num_seqs = 8").replace("len = 1024", "len = 110")
    assert "Total: 8" in run_program(small, tmp_path)
