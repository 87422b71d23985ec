"""No full garbage collection, which stops all threads for as long as it looks at everything, while an engine runs; and afterwards as it was."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import RequestOutput
from nanovllm.utils import heap
from nanovllm.utils.heap import settle_heap, settled_heap, unsettle_heap


class Cycle:
    def __init__(self) -> None:
        self.me = self


def forget_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nobody in this process had settled the heap; workers that other tests left end first."""
    gc.unfreeze()
    gc.collect()
    monkeypatch.setattr(heap, "_thresholds", [])
    gc.set_threshold(700, 10, 10)


@pytest.fixture(autouse=True)
def as_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test does ends with it; nor does it matter what others of this process left."""
    forget_others(monkeypatch)
    found = gc.get_threshold(), gc.get_freeze_count()
    yield
    assert (gc.get_threshold(), gc.get_freeze_count()) == found


def test_generate_leaves_the_collector_as_it_was(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(model_dir), kvcache_block_size=16, max_model_len=64)
    frozen: list[int] = []
    step = llm.step

    def watched() -> list[tuple[Sequence, RequestOutput]]:
        frozen.append(gc.get_freeze_count())
        if len(frozen) == 7:
            raise RuntimeError("in the middle")
        return step()

    monkeypatch.setattr(llm, "step", watched)
    before, thresholds = gc.get_freeze_count(), gc.get_threshold()
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    assert len(llm.generate([[1, 2]], params, use_tqdm=False)[0]["token_ids"]) == 4
    assert min(frozen) > before + 10_000, "modules, for the most part"
    with pytest.raises(RuntimeError, match="in the middle"):
        llm.generate([[1, 2]], params, use_tqdm=False)
    assert (gc.get_freeze_count(), gc.get_threshold()) == (before, thresholds)
    llm.exit()


def test_what_was_settled_twice_is_unsettled_twice() -> None:
    thresholds = gc.get_threshold()
    settle_heap()
    with settled_heap():
        assert gc.get_threshold()[0] > thresholds[0]
    assert gc.get_threshold()[0] > thresholds[0] and gc.get_freeze_count() > 10_000
    unsettle_heap()
    assert gc.get_threshold() == thresholds


def test_what_refers_to_itself_is_collected_before_and_after() -> None:
    cycle = Cycle()
    before, kept = weakref.ref(cycle), Cycle()
    del cycle
    settle_heap()
    assert before() is None
    after = weakref.ref(kept)
    del kept
    gc.collect()
    assert after() is not None, "out of sight"
    unsettle_heap()
    gc.collect()
    assert after() is None
