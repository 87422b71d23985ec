"""Which cluster a job uses: what `--address` of generate.py and RAY_ADDRESS may be. The driver is a process of the cluster's own network."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Mapping

from nanovllm import UserError

SUBMIT = "ray job submit --address {} --working-dir . -- python pipelines/generate.py ..."
CONNECT_S = 5.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HOST_PORT = re.compile(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+):(\d{1,5})")


def cluster_address(given: str | None, environment: Mapping[str, str]) -> str:
    """The address that `ray.init` gets: `local` (a Ray of the job's own), `auto` (the cluster of this node), or `host:port` of a GCS.

    Args:
        given: `--address`; None where there is none.
        environment: whose RAY_ADDRESS counts where nothing is given, and names the cluster that `auto` means where it is set, as
            `ray job submit` does.

    Raises:
        UserError: the address is of another kind, with what to use instead.
    """
    variable = environment.get("RAY_ADDRESS") or None
    if variable is not None and (given is None or (given == "auto" and variable != "local")):
        return _checked(variable, "RAY_ADDRESS")
    return "local" if given is None else _checked(given, "--address")


def _checked(address: str, where: str) -> str:
    if address in ("local", "auto"):
        return address
    host, scheme = address.rpartition("://")[2].split("/")[0], address.partition("://")[0].lower()
    if "://" in address and scheme in ("http", "https"):
        raise UserError(
            f"{where}={address!r} is for submitting jobs, and a driver cannot connect to it; submit it: {SUBMIT.format(address)}"
        )
    if "://" in address and scheme == "ray":
        dashboard = f"http://{host.rpartition(':')[0] or host}:8265"
        raise UserError(
            f"{where}={address!r} is a Ray client's, whose job would end with the connection; submit it: {SUBMIT.format(dashboard)}"
        )
    match = _HOST_PORT.fullmatch(address)
    if match is None or not 0 < int(match[2]) < 65536:
        raise UserError(
            f"{where}={address!r} is no address of a cluster; give auto, local, or host:port of its head (GCS, 6379 by default)"
        )
    return address


def check_reachable(address: str) -> None:
    """See that something listens at a cluster's `host:port`: `ray.init` itself would try for two minutes.

    Raises:
        UserError: nothing does, or another machine does not let us through.
    """
    match = _HOST_PORT.fullmatch(address)
    if match is None:
        return
    host, port = match[1].strip("[]"), int(match[2])
    hosts = [host]
    deadline = time.monotonic() + CONNECT_S
    while all(reasons := [_refusal(each, port) for each in hosts]):
        if time.monotonic() > deadline:
            raise UserError(
                f"no Ray cluster at {address!r}: {reasons[0]}; is its head running, and this machine in its network? From outside, "
                f"submit the job: {SUBMIT.format('http://HEAD:8265')}"
            )
        if host in LOOPBACK and len(hosts) == 1:
            from ray.util import get_node_ip_address

            hosts.append(get_node_ip_address())  # what Ray takes this machine's own names for
        else:
            time.sleep(1.0)


def _refusal(host: str, port: int) -> str:
    """Why nothing can be reached there; empty where something can."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""
