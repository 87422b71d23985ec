"""Where engines go: on one node or over several, how many, and on which nodes."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.groups import bundles
from cluster.placement import Placement, check_selector, eligible, matches, place, room
from nanovllm import EngineConfig, UserError
from pipelines.job import build


def engine(size: int = 1, device: str = "auto") -> EngineConfig:
    return EngineConfig.create("model", tensor_parallel_size=size, device=device)


@pytest.mark.parametrize(
    ("size", "nodes", "group", "expected"),
    [
        (1, [], "auto", Placement(1, 1, 0, False, 1)),
        (1, [8, 2], "auto", Placement(10, 10, 1, False, 1)),
        (1, [8, 2], "cluster", Placement(10, 10, 1, False, 1)),  # one rank needs no group
        (2, [2, 2], "auto", Placement(2, 2, 2, False, 2)),
        (4, [8, 2, 3], "auto", Placement(2, 2, 4, False, 4)),  # what is left of small nodes fits no engine
        (4, [8, 2, 2], "cluster", Placement(3, 3, 4, True, 4)),
        (2, [1, 1, 1], "auto", Placement(1, 1, 2, True, 2)),
        (2, [1, 1, 1], "node", Placement(1, 1, 0, False, 2)),
        (4, [1, 1], "auto", Placement(1, 1, 0, False, 4)),
        (2, [], "cluster", Placement(1, 1, 0, True, 2)),
    ],
)
def test_groups_follow_the_nodes(size: int, nodes: list[float], group: Any, expected: Placement) -> None:
    assert place(engine(size), "auto", None, nodes, group) == expected


def test_what_the_user_asks_for_is_asked_for_whatever_there_is() -> None:
    assert place(engine(8, "cuda"), (1, 4), 8, []) == Placement(1, 4, 8, False, 8)
    assert place(engine(8, "cuda"), (1, 4), 8, [4, 4]) == Placement(1, 4, 8, True, 8)
    assert place(engine(8, "cuda"), (1, 4), 8, [], "cluster") == Placement(1, 4, 8, True, 8)
    assert place(engine(1), "auto", 0.5, [1, 2]) == Placement(6, 6, 0.5)
    assert place(engine(2, "cpu"), "auto", None, [1, 1]) == Placement(1, 1, 0, False, 2)


def test_too_few_gpus_are_refused() -> None:
    with pytest.raises(UserError, match="tensor_parallel_size=4 needs as many GPUs, and Ray has 3"):
        place(engine(4, "cuda"), "auto", None, [2, 1])
    with pytest.raises(UserError, match=r"in one node, and the largest has 2; use run\.group=auto or cluster"):
        place(engine(4, "cuda"), "auto", None, [2, 2], "node")
    assert place(engine(4, "cuda"), "auto", None, [2, 2]).spanning
    with pytest.raises(UserError, match=r"run\.num_gpus=3 cannot be shared out to the 2 ranks"):
        place(engine(2), "auto", 3, [2, 2], "cluster")


def test_bundles() -> None:
    assert bundles(Placement(1, 1, 4, True, 4), 0) == [{"GPU": 1}] * 4
    assert bundles(Placement(1, 1, 4, True, 2), 3) == [{"GPU": 2, "CPU": 3}] * 2
    assert bundles(Placement(1, 1, 0, True, 2), 0) == [{"CPU": 1}] * 2


def test_room() -> None:
    nodes = [{"Resources": {"GPU": 3, "CPU": 8}}, {"Resources": {"CPU": 8}}, {"Resources": {"GPU": 8, "CPU": 2}}]
    assert room(nodes, {"GPU": 1}) == 11
    assert room(nodes, {"GPU": 1, "CPU": 1}) == 5
    assert room([], {"CPU": 1}) == 0


def test_selectors_take_the_nodes_that_ray_would() -> None:
    labels = {"ray.io/accelerator-type": "H200", "zone": "a"}
    for selector, expected in (
        ({"zone": "a"}, True),
        ({"zone": "a", "ray.io/accelerator-type": "A100"}, False),
        ({"zone": "!b"}, True),
        ({"zone": "in(b, a)"}, True),
        ({"zone": "!in(a,b)"}, False),
        ({"rack": "1"}, False),
        ({"rack": "!1"}, True),
    ):
        check_selector(selector)
        assert matches(labels, selector) == expected, selector
    nodes = [{"Alive": True, "Labels": labels}, {"Alive": True, "Labels": {}}, {"Alive": False, "Labels": labels}]
    assert eligible(nodes, []) == nodes[:2]
    assert eligible(nodes, [{"zone": "a"}]) == nodes[:1]
    assert eligible(nodes, [{"zone": "b"}, {"zone": "!b"}]) == nodes[:2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": "nodes"}, "run.group"),
        ({"label_selector": "H200"}, "run.label_selector"),
        ({"label_selector": {}}, "must name at least one label"),
        ({"label_selector": {"zone": "in(a"}}, "give a value, !value, in(a,b) or !in(a,b)"),
        ({"label_selector": {"zone": "a\nb"}}, "has 'a\\nb' for zone"),
        ({"label_selector": {"-zone": "a"}}, "no name of a label"),
        ({"label_selector": {"zone": 3}}, "run.label_selector.zone"),
        ({"label_selector": {"zone": "a"}, "label_fallbacks": [{"zone": ""}]}, "has '' for zone"),
        ({"label_selector": {"zone": "a"}, "label_fallbacks": {"zone": "b"}}, "run.label_fallbacks"),
        ({"label_fallbacks": [{"zone": "b"}]}, "label_fallbacks need the label_selector"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        build({"model": "m", "input": "i", "output": "o", "run": settings})
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_good_settings() -> None:
    run = {"label_selector": {"zone": "a"}, "label_fallbacks": [{"zone": "b"}, {"zone": "!a"}], "group": "cluster"}
    config = build({"model": "m", "input": "i", "output": "o", "run": run})
    assert config.run.selectors == [{"zone": "a"}, {"zone": "b"}, {"zone": "!a"}]
    assert build(config.as_dict()) == config
    assert build({"model": "m", "input": "i", "output": "o"}).run.selectors == []
