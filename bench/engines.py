"""Engines behind one small interface, and the loop that times them: used by `throughput.py` in its own process, and by
`peers.py` in a process for each engine (`python bench/engines.py JOB.json RESULT.json`)."""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

# Nothing of this folder or of nanovllm is imported here: workers of a peer import this file anew, and a peer may be
# another nanovllm.
if TYPE_CHECKING:
    from common import Workload


class Engine(Protocol):
    """What the timing loop needs."""

    version: str | None

    def generate(self, prompts: list[list[int]], max_tokens: list[int], temperature: float) -> int:
        """Run one prompt for each of `max_tokens`, past end-of-sequence tokens; the number of tokens generated."""

    def close(self) -> None:
        """Free the engine."""


class NanoVLLM:
    """Any module with the `LLM` and `SamplingParams` of nano-vllm: this project's engine is one."""

    def __init__(self, module: str, model: str, options: dict[str, Any]) -> None:
        self.module = importlib.import_module(module)
        self.version = getattr(self.module, "__version__", None)
        self.llm = self.module.LLM(model, **options)

    def generate(self, prompts: list[list[int]], max_tokens: list[int], temperature: float) -> int:
        """See `Engine`."""
        params = [
            self.module.SamplingParams(temperature=temperature, max_tokens=n, ignore_eos=True) for n in max_tokens
        ]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        failed = [output["error"] for output in outputs if output.get("error")]
        if failed:
            raise SystemExit(f"{len(failed)} prompts failed, the first with: {failed[0]}")
        return sum(len(output["token_ids"]) for output in outputs)

    def close(self) -> None:
        """See `Engine`; programs without `exit` free themselves."""
        if hasattr(self.llm, "exit"):
            self.llm.exit()


class VLLM:
    """vLLM 0.24."""

    def __init__(self, module: str, model: str, options: dict[str, Any]) -> None:
        self.module = importlib.import_module(module)
        self.version = self.module.__version__
        self.llm = self.module.LLM(model=model, **options)

    def generate(self, prompts: list[list[int]], max_tokens: list[int], temperature: float) -> int:
        """See `Engine`."""
        params = [
            self.module.SamplingParams(temperature=temperature, max_tokens=n, ignore_eos=True, detokenize=False)
            for n in max_tokens
        ]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(requests, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def close(self) -> None:
        """Its workers end with the process."""


ENGINES: dict[str, type[NanoVLLM] | type[VLLM]] = {"nanovllm_style": NanoVLLM, "vllm": VLLM}


def warm_up(engine: Engine, temperature: float) -> None:
    """A few short prompts, so that what the first call sets up is not timed."""
    engine.generate([[1, 2, 3]] * 8, [32] * 8, temperature)


def timed_runs(engine: Engine, work: Workload, runs: int, temperature: float) -> list[float]:
    """Seconds of each of `runs` runs of the workload."""
    expected = sum(work.max_tokens)
    seconds: list[float] = []
    for run in range(runs):
        prompts = work.for_run(run)
        start = time.perf_counter()
        made = engine.generate(prompts, work.max_tokens, temperature)
        seconds.append(time.perf_counter() - start)
        if made != expected:
            raise SystemExit(f"{made} tokens came back instead of {expected}")
        print(f"run {run}: {made / seconds[-1]:.1f} output tok/s in {seconds[-1]:.3f} s", flush=True)
    return seconds


def memory() -> dict[str, Any]:
    """Peak memory in MiB: of this process, and on a GPU of its torch allocations and of the whole device now."""
    import torch

    result: dict[str, Any] = {"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        result["gpu_peak_allocated_mib"] = torch.cuda.max_memory_allocated() >> 20
        result["gpu_used_mib"] = (total - free) >> 20
    return result


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    from common import WorkloadSpec

    # The peer's own modules first, and none of this folder's, whose names are everyday words.
    sys.path = [*filter(None, [job["path"]]), *(entry for entry in sys.path if entry != str(Path(__file__).parent))]
    work = WorkloadSpec(**job["workload"]).make(job["vocab_size"])
    start = time.perf_counter()
    engine: Engine = ENGINES[job["engine"]](job["module"], job["model"], job["options"])
    load_s = time.perf_counter() - start
    warm_up(engine, job["temperature"])
    seconds = timed_runs(engine, work, job["runs"], job["temperature"])
    result = {"version": engine.version, "digest": work.digest(), "load_s": round(load_s, 2), "seconds": seconds}
    Path(sys.argv[2]).write_text(json.dumps(result | memory()))
    engine.close()


if __name__ == "__main__":
    main()
