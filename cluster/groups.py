"""Engines whose ranks are on several nodes: a placement group for each, which its actor and the actors of its ranks share.

The job's driver makes `Groups` and hands them to Ray Data, which starts the engines' actors. Each lies in the first bundle of a group of
its own; the engine in it is given `ActorRanks`, which start the other ranks in the other bundles. Ray replaces bundles of nodes that are
lost, and restarts the actor in its group. Ranks end with their engine and it with them, so a fault never leaves the group.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.placement import Labels, Placement, eligible, room
from nanovllm.engine.ranks import RankEnd, RankHandle, RemoteRanks, rank_end, start_remote_rank
from nanovllm.errors import EngineDeadError, UserError

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.util.placement_group import PlacementGroup

LOOK_S = 2.0
# A group that nobody took in this time belongs to no actor.
UNCLAIMED_S = 60.0
# How long a group may wait for room on nodes that are asked for first, before those that come next are asked for.
FALLBACK_S = 3.0
TELL_S = 30.0


@contextmanager
def actor_options(
    placement: Placement, num_cpus: float, selector: Labels | None, fallbacks: Sequence[Labels]
) -> Iterator[dict[str, Any]]:
    """Arguments of `map_batches` that put engines where they belong, for as long as the pool lives.

    Args:
        num_cpus: that Ray reserves for an actor; where engines are spanning, for each rank.
        selector: labels of the nodes that engines are to run on; fallbacks: others, in the order in which they are tried.
    """
    if not placement.spanning:
        labels: dict[str, Any] = {} if selector is None else {"label_selector": dict(selector)}
        if fallbacks:
            labels["fallback_strategy"] = [{"label_selector": dict(other)} for other in fallbacks]
        yield {"num_cpus": num_cpus, "num_gpus": placement.num_gpus, **labels}
        return
    with Groups(bundles(placement, num_cpus), [dict(s) for s in (selector, *fallbacks) if s]) as groups:
        first = groups.bundles[0]
        yield {
            "num_cpus": first.get("CPU", 0),
            "num_gpus": first.get("GPU", 0),
            "ray_remote_args_fn": groups.reserve,
        }


def bundles(placement: Placement, num_cpus: float) -> list[dict[str, float]]:
    """What each rank of a spanning engine reserves. Ray takes no empty bundles: without GPUs it is a CPU at least."""
    gpus = placement.gpus_each
    cpus = num_cpus if gpus else max(1.0, num_cpus)
    return [{name: amount for name, amount in (("GPU", gpus), ("CPU", cpus)) if amount}] * placement.ranks


@dataclass
class _Reserved:
    group: PlacementGroup
    made: float = field(default_factory=time.monotonic)
    claimed: bool = False


class Groups:
    """The placement groups of a pool of engines. As a context: they are there inside of it, and none is left behind.

    Attributes:
        bundles: of each group.
    """

    def __init__(self, bundles: Sequence[Mapping[str, float]], selectors: Sequence[Labels]) -> None:
        self.bundles = [dict(bundle) for bundle in bundles]
        self._selectors = selectors
        self._reserved: dict[str, _Reserved] = {}
        self._lock = threading.Lock()
        self._told = False
        self._over = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="groups", daemon=True)

    def __enter__(self) -> Groups:
        """Begin to look after them."""
        self._keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove them all, and what runs in them."""
        import ray

        self._over.set()
        self._keeper.join()
        if not ray.is_initialized():  # they went with the job; to ask for that would start Ray anew
            return
        with self._lock:
            for reserved in self._reserved.values():
                with suppress(ray.exceptions.RayError, ConnectionError):
                    ray.util.remove_placement_group(reserved.group)
            self._reserved.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Groups:
        """Itself: Ray Data copies what it is given."""
        return self

    def reserve(self) -> dict[str, Any]:
        """Reserve a group for an actor that is about to be started: the options to start it with. Ray Data's `ray_remote_args_fn`."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.sweep()  # an actor that could not start holds what its replacement needs
        group = self._make()
        name = _name(group)
        with self._lock:
            self._reserved[name] = _Reserved(group)
        # By its name the keeper sees whether the actor is there.
        return {"name": name, "scheduling_strategy": PlacementGroupSchedulingStrategy(group, 0)}

    def sweep(self) -> None:
        """Remove groups whose actors are gone for good, which is not said of one that Ray restarts."""
        import ray

        there = set(ray.util.list_named_actors())
        with self._lock:
            for name, reserved in list(self._reserved.items()):
                if name in there:
                    reserved.claimed = True
                elif reserved.claimed or time.monotonic() - reserved.made > UNCLAIMED_S:
                    ray.util.remove_placement_group(reserved.group)
                    del self._reserved[name]

    def _make(self) -> PlacementGroup:
        import ray
        from ray.util import remove_placement_group

        if not self._selectors:
            return self._ask()
        nodes = ray.nodes()
        # Those that nodes can satisfy which are there, whoever uses them now; where there are none, one must come.
        large = [s for s in self._selectors if room(eligible(nodes, [s]), self.bundles[0]) >= len(self.bundles)]
        choices = large or self._selectors[:1]
        for selector in choices:
            group = self._ask(selector)
            if len(choices) == 1 or group.wait(FALLBACK_S):
                return group
            remove_placement_group(group)
        return self._ask(choices[0])

    def _ask(self, selector: Labels | None = None) -> PlacementGroup:
        from ray.util import placement_group

        labels = {} if selector is None else {"bundle_label_selector": [dict(selector)] * len(self.bundles)}
        return placement_group(self.bundles, strategy="PACK", **labels)

    def _keep(self) -> None:
        """Thread: look after the groups while the pool lives."""
        import ray

        while not self._over.wait(LOOK_S) and ray.is_initialized():
            with suppress(ray.exceptions.RayError, ConnectionError, RuntimeError):  # the head is away
                self.sweep()
                self._tell()

    def _tell(self) -> None:
        """Say once that a group waits."""
        from ray.util import placement_group_table

        with self._lock:
            old = [r.group for r in self._reserved.values() if time.monotonic() - r.made > TELL_S]
        if self._told or not any(placement_group_table(group).get("state") == "PENDING" for group in old):
            return
        self._told = True
        needs = ", ".join(f"{amount:g} {name}" for name, amount in self.bundles[0].items())
        print(
            f"an engine waits for nodes with room for its {len(self.bundles)} ranks, {needs} each; see `ray status`",
            file=sys.stderr,
            flush=True,
        )


def _name(group: PlacementGroup) -> str:
    return f"engine-{group.id.hex()}"


class RankHost:
    """Runs one rank on its node, in a process below it. Run as a Ray actor of the group; both end with it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(
        self, address: str, port: int, secret: bytes, rank: int, fetch: Callable[[], object] | None = None
    ) -> str:
        """Start the rank, after `fetch`; what to call it. See `start_remote_rank`."""
        if fetch is not None:
            fetch()
        self._process = start_remote_rank(address, port, secret, rank)
        return f"pid {self._process.pid} on {own_address()}"

    def wait(self) -> int:
        """Wait for the rank's end: its exit status, negative where a signal ended it."""
        assert self._process is not None
        return self._process.wait()


class ActorRank(RankHandle):
    """A rank that a `RankHost` runs."""

    here = False

    def __init__(self, host: ActorHandle[RankHost], name: str) -> None:
        self._host = host
        self._ended = host.wait.remote()
        self.name = name

    def end(self, timeout_s: float) -> RankEnd | None:
        """See `RankHandle.end`."""
        import ray

        try:
            return rank_end(ray.get(self._ended, timeout=timeout_s))
        except ray.exceptions.GetTimeoutError:
            return None
        except ray.exceptions.RayError:
            return RankEnd("was lost with its actor or its node", True, True)

    def kill(self) -> None:
        """See `RankHandle.kill`."""
        import ray

        with suppress(ray.exceptions.RayError):
            ray.kill(self._host)


class ActorRanks(RemoteRanks):
    """Ranks in the placement group that the engine's own actor is in, one in each bundle.

    Args:
        fetch: called on a rank's node first: it brings the model there, to where the engine's own node has it.
    """

    def __init__(self, fetch: Callable[[], object] | None = None) -> None:
        self._fetch = fetch

    def address(self) -> str:
        """See `RemoteRanks.address`."""
        return own_address()

    def start(self, ranks: Sequence[int], address: str, port: int, secret: bytes) -> list[RankHandle]:
        """See `RemoteRanks.start`. Waits for bundles that Ray has lost with a node and not replaced yet."""
        import ray
        from ray.util import get_current_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = get_current_placement_group()
        if group is None or group.bundle_count != len(ranks) + 1:
            raise UserError("ranks on several nodes need the placement group that run.group=cluster makes")
        host = ray.remote(RankHost)
        hosts = []
        for rank in ranks:
            reserved = group.bundle_specs[rank]
            hosts.append(
                host.options(
                    num_cpus=reserved.get("CPU", 0),
                    num_gpus=reserved.get("GPU", 0),
                    scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank),
                ).remote()
            )
        try:
            starting = [
                host.start.remote(address, port, secret, rank, self._fetch)
                for host, rank in zip(hosts, ranks, strict=True)
            ]
            names = ray.get(starting)
        except BaseException as error:
            for host in hosts:
                ray.kill(host)
            if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, UserError):
                raise error.cause from None
            if isinstance(error, ray.exceptions.RayError):
                raise EngineDeadError(f"a tensor-parallel rank could not be started: {error}", True) from None
            raise
        return [ActorRank(host, name) for host, name in zip(hosts, names, strict=True)]


def own_address() -> str:
    """The address under which the cluster knows this node."""
    import ray

    address: str = ray.util.get_node_ip_address()
    return address
