"""What `--address` and RAY_ADDRESS may be."""

from __future__ import annotations

import re
import socket

import pytest

from cluster.address import check_reachable, cluster_address
from nanovllm import UserError
from pipelines.generate import main


@pytest.mark.parametrize(
    ("given", "variable", "expected"),
    [
        (None, None, "local"),
        (None, "", "local"),
        (None, "10.0.0.1:6379", "10.0.0.1:6379"),
        ("auto", None, "auto"),
        ("auto", "local", "auto"),
        ("auto", "10.0.0.1:6379", "10.0.0.1:6379"),  # in a submitted job, the cluster that it was submitted to
        ("head:6379", "10.0.0.1:6379", "head:6379"),
        ("[fd00::1]:6379", None, "[fd00::1]:6379"),
        ("local", "10.0.0.1:6379", "local"),
    ],
)
def test_which_cluster(given: str | None, variable: str | None, expected: str) -> None:
    assert cluster_address(given, {} if variable is None else {"RAY_ADDRESS": variable}) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            "http://head:8265",
            r"ray job submit --address http://head:8265 --working-dir \. -- python pipelines/generate.py",
        ),
        ("https://ray.example.org", r"submit it: ray job submit --address https://ray.example.org"),
        ("ray://head:10001", r"Ray client.*ray job submit --address http://head:8265"),
        ("head", r"give auto, local, or host:port"),
        ("head:0", r"give auto, local, or host:port"),
        ("head:70000", r"give auto, local, or host:port"),
        ("", r"give auto, local, or host:port"),
        ("grpc://head:6379", r"give auto, local, or host:port"),
    ],
)
def test_refused_with_what_to_use(given: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    job = ["--model", "m", "--input", "i", "--output", "o"]
    assert main([*job, "--address", given]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.match(f"error: --address={re.escape(repr(given))} .*{expected}", err), err


def test_the_variable_is_held_to_the_same() -> None:
    with pytest.raises(UserError, match="RAY_ADDRESS='ray://head:10001' is a Ray client's"):
        cluster_address(None, {"RAY_ADDRESS": "ray://head:10001"})


def test_whether_something_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.address.CONNECT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        check_reachable(address)
    with pytest.raises(UserError, match=f"no Ray cluster at {address!r}: .*submit the job"):
        check_reachable(address)
    check_reachable("auto")
    check_reachable("local")
