"""Which process a process id means. `lease` asks whether a claim's writer lives; the driver ends actors that hang."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def home() -> str | None:
    """Where process ids mean what they mean here: host, boot and PID namespace. None where the system does not say."""
    try:
        return f"{socket.gethostname()} {boot()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def boot() -> str:
    """Names this boot of the machine.

    Raises:
        OSError: the system does not say.
    """
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def born(pid: int) -> str | None:
    """When a process began, in ticks since boot; None where that cannot be read."""
    fields = _stat(pid)
    return fields[19] if fields else None


def is_dead(pid: int, birth: str | None) -> bool:
    """Whether the process `pid` that began at `birth` is dead. In doubt it is not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    fields = _stat(pid)
    return bool(fields) and (fields[0] in "ZX" or fields[19] != birth)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the state on; none where it cannot be read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
