"""Whether the node of this process is about to go: a spot notice, a pod that ends, `ray drain-node`. Asked by the job's workers."""

from __future__ import annotations

TIMEOUT_S = 2.0


def node_is_draining() -> bool:
    """Whether Ray has been told that this node will be taken away. Its processes run on until then.

    Ray has no public way to ask: where this one has changed, or the head does not answer, no node is about to go.
    """
    import ray

    try:
        client = ray._private.worker.global_worker.gcs_client
        return ray.get_runtime_context().get_node_id() in client.get_draining_nodes(timeout=TIMEOUT_S)
    except Exception:  # Ray's clients raise many kinds
        return False
