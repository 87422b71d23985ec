"""How many engine actors a cluster carries, which resources each one reserves, and on which nodes. Called by the job's driver."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from nanovllm import EngineConfig, UserError

Group = Literal["auto", "node", "cluster"]
Labels = Mapping[str, str]

# Ray's own syntax, which is that of Kubernetes, and what it allows in a selector.
_NAME = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_KEY = re.compile(rf"(?:{_NAME}(?:\.{_NAME})*/)?{_NAME}")
_SELECTION = re.compile(rf"(?P<no>!?)(?:(?P<one>{_NAME})|in\((?P<many>{_NAME}(?:, ?{_NAME})*)\))")


class Placement(NamedTuple):
    """Where engines go.

    Attributes:
        min_actors, max_actors: how many.
        num_gpus: that each reserves, with all its ranks; 0: engines run on CPUs.
        spanning: its ranks may be on several nodes; else it has a node's GPUs, and its ranks are child processes.
        ranks: of each engine.
    """

    min_actors: int
    max_actors: int
    num_gpus: float
    spanning: bool = False
    ranks: int = 1

    @property
    def gpus_each(self) -> float:
        """GPUs of one actor: of a rank's where engines are spanning."""
        return self.num_gpus / self.ranks if self.spanning else self.num_gpus


def place(
    engine: EngineConfig,
    replicas: Literal["auto"] | tuple[int, int],
    num_gpus: float | None,
    node_gpus: Sequence[float],
    group: Group = "auto",
) -> Placement:
    """Fit engines to a cluster.

    Args:
        engine: its `device` and `tensor_parallel_size` decide the GPUs of an actor.
        replicas: least and most actors; "auto" is one for each group of GPUs, and one where engines run on CPUs.
        num_gpus: GPUs of an actor where the user has said so; they are then asked for whatever the cluster has now.
        node_gpus: GPUs of each node that engines may run on.
        group: where the ranks of an engine may be: on one "node", anywhere in the "cluster"; "auto" takes a node where one is large
            enough, or where nothing is known of the nodes to come.

    Raises:
        UserError: engines must run on GPUs and the cluster has not enough for one, or GPUs cannot be shared out to ranks.
    """
    size, cluster_gpus, largest = engine.tensor_parallel_size, sum(node_gpus), max(node_gpus, default=0)
    wanted = num_gpus if num_gpus is not None else 0 if engine.device == "cpu" else size
    spanning = size > 1 and (group == "cluster" or (group == "auto" and largest < wanted <= cluster_gpus))
    if num_gpus is None:
        room = cluster_gpus if spanning else largest
        if engine.device == "cuda" and room < size:
            raise UserError(_too_few(size, cluster_gpus, largest, group))
        num_gpus = float(size) if engine.device != "cpu" and room >= size else 0.0
    if spanning and num_gpus % size:
        raise UserError(
            f"run.num_gpus={num_gpus:g} cannot be shared out to the {size} ranks of an engine on several nodes; "
            f"leave it out, or give a multiple of {size}"
        )
    if replicas != "auto":
        return Placement(*replicas, num_gpus, spanning, size)
    room_for = [cluster_gpus] if spanning else node_gpus
    actors = max(1, sum(int(gpus // num_gpus) for gpus in room_for)) if num_gpus else 1
    return Placement(actors, actors, num_gpus, spanning, size)


def _too_few(size: int, cluster_gpus: float, largest: float, group: Group) -> str:
    if group == "node" and cluster_gpus >= size:
        return (
            f"run.group=node with engine.tensor_parallel_size={size} needs as many GPUs in one node, and the largest has "
            f"{largest:g}; use run.group=auto or cluster, or set run.num_gpus to wait for an autoscaler"
        )
    return (
        f"engine.device=cuda with tensor_parallel_size={size} needs as many GPUs, and Ray has {cluster_gpus:g}; "
        "use engine.device=auto or cpu, or set run.num_gpus to wait for an autoscaler"
    )


def local_gpus() -> int:
    """GPUs of this machine."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


# Nodes by their labels


def check_selector(selector: Labels) -> None:
    """Check that Ray would take a label selector.

    Raises:
        ValueError: it would not; says why.
    """
    if not selector:
        raise ValueError("must name at least one label, for example {ray.io/accelerator-type: H200}")
    for key, value in selector.items():
        if not _KEY.fullmatch(key):
            raise ValueError(f"has {key!r}, which is no name of a label; see `ray.nodes()` for those there are")
        if not _SELECTION.fullmatch(value):
            raise ValueError(f"has {value!r} for {key}; give a value, !value, in(a,b) or !in(a,b)")


def matches(labels: Labels, selector: Labels) -> bool:
    """Whether a node with these labels is one that the selector asks for."""
    for key, text in selector.items():
        found = _SELECTION.fullmatch(text)
        if found is None:
            return False
        values = re.split(", ?", found["many"]) if found["many"] else [found["one"]]
        if (labels.get(key) in values) == bool(found["no"]):
            return False
    return True


def eligible(nodes: Iterable[Mapping[str, Any]], selectors: Sequence[Labels]) -> list[Mapping[str, Any]]:
    """Those of `ray.nodes()` that live and that any of the selectors asks for; without selectors all that live."""
    alive = [node for node in nodes if node["Alive"]]
    if not selectors:
        return alive
    return [node for node in alive if any(matches(node.get("Labels", {}), selector) for selector in selectors)]


def room(nodes: Iterable[Mapping[str, Any]], bundle: Mapping[str, float]) -> int:
    """How many such bundles of resources these nodes hold if nobody else uses them."""
    return sum(min(int(node["Resources"].get(name, 0) // amount) for name, amount in bundle.items()) for node in nodes)
