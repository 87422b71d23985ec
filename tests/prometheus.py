"""A real Prometheus on a random port of 127.0.0.1, with the project's own scrape file, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

CLUSTER = Path(__file__).resolve().parent.parent / "cluster"
START_S = 120.0
Series = dict[str, Any]


def installed() -> bool:
    """Whether there is a Prometheus."""
    return shutil.which("prometheus") is not None


def dashboard_queries() -> dict[str, list[str]]:
    """Title of a panel in `cluster/grafana.json` -> its expressions, with values for Grafana's variables."""
    values = {"$output": ".*", "$__rate_interval": "1m", "$__range": "1h"}
    found: dict[str, list[str]] = {}
    for panel in json.loads((CLUSTER / "grafana.json").read_text())["panels"]:
        for target in panel["targets"]:
            expression = re.sub("|".join(map(re.escape, values)), lambda name: values[name[0]], target["expr"])
            found.setdefault(panel["title"], []).append(expression)
    return found


class Prometheus:
    """A running one. Every request waits a little where it is busy."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log
        self._address = ""
        self.wait_for(self._is_ready, START_S)

    def query(self, expression: str) -> list[Series]:
        """The series that an expression gives now.

        Raises:
            ValueError: Prometheus refuses it; with its reason.
        """
        return self._ask("query", query=expression)

    def query_since(self, began: float, expression: str) -> list[Series]:
        """The series that an expression gave at any time since `began` (`time.time()`), as a panel shows them.

        Raises:
            ValueError: as `query`.
        """
        return self._ask("query_range", query=expression, start=began, end=time.time(), step=1)

    def value(self, expression: str) -> float | None:
        """Of an expression that gives one series or none."""
        series = self.query(expression)
        assert len(series) <= 1, series
        return float(series[0]["value"][1]) if series else None

    def total(self, name: str, labels: str = "", over: str = "1h") -> float:
        """A counter summed over all processes, those that are gone too; 0 where there is none."""
        return self.value(f"sum(max_over_time({name}{{{labels}}}[{over}]))") or 0.0

    def wait_for(self, what: Callable[[], Any], timeout: float = 120.0) -> Any:
        """Wait until `what` returns something true, and return that."""
        deadline = time.monotonic() + timeout
        while not (found := what()):
            assert self._process.poll() is None, f"Prometheus ended:\n{self._log.read_text()[-2000:]}"
            assert time.monotonic() < deadline, "Prometheus never came so far"
            time.sleep(0.2)
        return found

    def _is_ready(self) -> bool:
        listening = psutil.Process(self._process.pid).net_connections("tcp")
        ports = [socket.laddr.port for socket in listening if socket.status == psutil.CONN_LISTEN]
        if not ports:
            return False
        self._address = f"http://127.0.0.1:{ports[0]}"
        with contextlib.suppress(OSError):
            return bool(self._get("/-/ready"))
        return False

    def _ask(self, how: str, **parameters: Any) -> list[Series]:
        try:
            answer = self._get(f"/api/v1/{how}?{urllib.parse.urlencode(parameters)}")
        except urllib.error.HTTPError as error:
            raise ValueError(f"{parameters['query']}: {json.load(error).get('error')}") from None
        series: list[Series] = json.loads(answer)["data"]["result"]
        return series

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(self._address + path, timeout=60) as answer:
            return bytes(answer.read())


@contextmanager
def prometheus(targets: Path, directory: Path) -> Iterator[Prometheus]:
    """Start one that scrapes what Ray writes into `targets` every 3 s; stop it at the end.

    Args:
        targets: `LocalNodes.prometheus_targets`.
        directory: for its data, empty.
    """
    directory.mkdir(parents=True, exist_ok=True)
    text = (CLUSTER / "prometheus.yaml").read_text()
    text, changed = re.subn(r"files: \[.*\]", f"files: [{targets}]", text)
    text, intervals = re.subn(r"interval: 10s", "interval: 3s", text)  # and as long a time-out
    assert (changed, intervals) == (1, 2), "cluster/prometheus.yaml is not as it was"
    config, log = directory / "prometheus.yaml", directory / "log"
    config.write_text(text)
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={directory / 'data'}"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--web.listen-address=127.0.0.1:0"], stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield Prometheus(process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()
