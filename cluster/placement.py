"""How many engine actors a cluster carries and which resources each one reserves. Called by the job's driver."""

from __future__ import annotations

from typing import Literal, NamedTuple

from nanovllm import EngineConfig, UserError


class Placement(NamedTuple):
    """Least and most engine actors, and the GPUs each reserves (0: engines run on CPUs)."""

    min_actors: int
    max_actors: int
    num_gpus: float


def place(
    engine: EngineConfig, replicas: Literal["auto"] | tuple[int, int], num_gpus: float | None, cluster_gpus: float
) -> Placement:
    """Fit engines to a cluster.

    Args:
        engine: its `device` and `tensor_parallel_size` decide the GPUs of an actor.
        replicas: least and most actors; "auto" is one for each group of GPUs, and one where engines run on CPUs.
        num_gpus: GPUs of an actor where the user has said so; they are then asked for whatever the cluster has now.
        cluster_gpus: GPUs of the cluster.

    Raises:
        UserError: engines must run on GPUs and the cluster has not enough for one.
    """
    size = engine.tensor_parallel_size
    if num_gpus is None:
        if engine.device == "cuda" and cluster_gpus < size:
            raise UserError(
                f"engine.device=cuda with tensor_parallel_size={size} needs as many GPUs, and Ray has {cluster_gpus:g}; "
                "use engine.device=auto or cpu, or set run.num_gpus to wait for an autoscaler"
            )
        num_gpus = float(size) if engine.device != "cpu" and cluster_gpus >= size else 0.0
    if replicas != "auto":
        return Placement(*replicas, num_gpus)
    actors = max(1, int(cluster_gpus // num_gpus)) if num_gpus else 1
    return Placement(actors, actors, num_gpus)


def local_gpus() -> int:
    """GPUs of this machine."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
