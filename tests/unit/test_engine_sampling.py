"""Sampling: the tokens follow the softmax, and a row's random numbers belong to the row and to nothing else."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.engine import scheduler
from nanovllm.kernels.sampling import gumbel_noise, keys_to_tokens, sample_keys_torch
from tests.preemption import NoReserve


def sample(logits: torch.Tensor, *state: torch.Tensor) -> torch.Tensor:
    """Tokens of rows whose temperatures, seeds and steps are `state`."""
    return keys_to_tokens(sample_keys_torch(logits, torch.arange(len(logits)), *state))


def draw(logits: torch.Tensor, temperature: float, seeds: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    rows = logits.expand(len(seeds), -1)
    return sample(rows, torch.full((len(seeds),), temperature), seeds, steps)


def assert_follows_softmax(tokens: torch.Tensor, logits: torch.Tensor, temperature: float) -> None:
    """Pearson's chi-square, five deviations wide; rare tokens are counted as one."""
    expected = torch.softmax(logits.double() / temperature, -1) * len(tokens)
    counts = torch.bincount(tokens, minlength=len(logits)).double()
    rare = expected < 10
    if bool(rare.any()):
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
    freedom = len(expected) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), (statistic, freedom)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("first_seed", [0, 2**31 - 10000, 2**40, 2**63 - 20000])
def test_tokens_follow_the_softmax(temperature: float, first_seed: int) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 2
    count = 20000
    seeds = torch.arange(count) + first_seed
    assert_follows_softmax(draw(logits, temperature, seeds, torch.zeros_like(seeds)), logits, temperature)
    one_row = torch.full((count,), first_seed)
    assert_follows_softmax(draw(logits, temperature, one_row, torch.arange(count)), logits, temperature)


def test_neighbouring_rows_and_steps_are_independent() -> None:
    """The pair (token of one row, token of the next) is as likely as its parts' product; so it is for steps."""
    logits = torch.tensor([0.5, 0.0, -0.5, 1.0])
    log_pairs = (logits[:, None] + logits[None]).flatten()
    numbers = torch.arange(40000)
    for tokens in (
        draw(logits, 1.0, numbers, torch.zeros_like(numbers)),
        draw(logits, 1.0, torch.zeros_like(numbers), numbers),
        draw(logits, 1.0, numbers, numbers),
    ):
        assert_follows_softmax(tokens[:-1] * 4 + tokens[1:], log_pairs, 1.0)


def test_noise_is_standard_gumbel_and_finite() -> None:
    noise = gumbel_noise(torch.arange(64) * 12345, torch.arange(64), 20000)
    assert bool(noise.isfinite().all())
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.01)
    # The ends of the uniform numbers' range: infinite noise here would make one token in a hundred a random one, with
    # 151,936 tokens to choose from.
    assert bool(gumbel_noise(torch.tensor([16, 86]), torch.tensor([0, 0]), 102395).isfinite().all())


def test_a_row_does_not_see_its_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 300, generator=generator)
    temperatures = torch.rand(64, generator=generator) * 2
    temperatures[::7] = 0
    seeds = torch.randint(0, 2**62, (64,), generator=generator)
    steps = torch.randint(0, 5000, (64,), generator=generator)
    together = sample(logits, temperatures, seeds, steps)
    order = torch.randperm(64, generator=generator)
    assert torch.equal(sample(logits[order], temperatures[order], seeds[order], steps[order]), together[order])
    for i in range(64):
        alone = sample(logits[i : i + 1], temperatures[i : i + 1], seeds[i : i + 1], steps[i : i + 1])
        assert alone.item() == together[i].item()


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-40, 1e-30, 1e-10])
def test_lowest_temperatures_are_greedy(temperature: float) -> None:
    logits = torch.randn(100, 50, generator=torch.Generator().manual_seed(0)) * 5
    tokens = sample(logits, torch.full((100,), temperature), torch.arange(100), torch.zeros(100, dtype=torch.int64))
    assert torch.equal(tokens, logits.argmax(-1))


def test_highest_temperature_is_uniform() -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(0)) * 5
    for temperature in (1e30, math.inf):  # inf: what float32 makes of temperatures above 3e38
        tokens = draw(logits, temperature, torch.arange(5000), torch.zeros(5000, dtype=torch.int64))
        assert_follows_softmax(tokens, torch.zeros(20), 1.0)


def prompts_and_params(count: int = 12) -> tuple[list[list[int]], list[SamplingParams]]:
    rng = random.Random(0)
    prompts = [[rng.randrange(257) for _ in range(rng.randint(1, 40))] for _ in range(count)]
    params = [SamplingParams(temperature=0.5 + i / 10, max_tokens=20, seed=1000 * i) for i in range(count)]
    return prompts, params


def token_ids(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    return [o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)]


def test_seeded_rows_do_not_depend_on_the_batch(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, params = prompts_and_params()
    llm = LLM(str(model_dir), kvcache_block_size=16)
    together = token_ids(llm, prompts, params)
    assert len({tuple(row) for row in together}) == len(prompts)
    alone = [token_ids(llm, [prompt], [param])[0] for prompt, param in zip(prompts, params, strict=True)]
    assert alone == together
    assert token_ids(llm, prompts[::-1], params[::-1])[::-1] == together
    others = [SamplingParams(temperature=2.0, max_tokens=7)] * 30
    assert token_ids(llm, [[5]] * 30 + prompts, others + params)[30:] == together
    # Greedy rows beside them must not change how they are sampled, nor the other way round.
    greedy = [SamplingParams(temperature=0, max_tokens=9)] * 5
    mixed = token_ids(llm, [[1, 2]] * 5 + prompts, greedy + params)
    assert mixed[5:] == together
    assert mixed[:5] == [token_ids(llm, [[1, 2]], greedy[:1])[0]] * 5

    monkeypatch.setattr(scheduler, "Demand", NoReserve)
    small = LLM(str(model_dir), kvcache_block_size=16, num_kvcache_blocks=5, max_num_batched_tokens=9, seed=99)
    assert token_ids(small, prompts, params) == together
    assert small.scheduler.num_preemptions > 0


def test_seeds_decide(model_dir: Path) -> None:
    llm = LLM(str(model_dir), kvcache_block_size=16)
    seeds = [0, 0, 1, 2, 2**32, 2**62, 2**63 - 1]
    rows = token_ids(llm, [[7, 8]] * len(seeds), [SamplingParams(1.0, 20, seed=seed) for seed in seeds])
    assert rows[0] == rows[1]
    assert len({tuple(row) for row in rows}) == len(set(seeds))


def test_unseeded_requests_follow_the_engine_seed(model_dir: Path) -> None:
    params = [SamplingParams(temperature=1.0, max_tokens=12)] * 6
    first, again, other = (
        token_ids(LLM(str(model_dir), kvcache_block_size=16, seed=seed), [[3, 4]] * 6, params) for seed in (5, 5, 6)
    )
    assert first == again
    assert first != other
    assert len({tuple(row) for row in first}) == 6, "equal prompts are drawn independently"
