"""Models on a store or a hub: fetched once a node, resumed at the byte, verified, and never fetched by the driver."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import pipelines.models
from nanovllm import UserError
from pipelines import NanoVLLMPredictor
from pipelines.generate import main
from pipelines.models import EDGE_BYTES, SUMS, Source, local_model, look
from pipelines.plan import model_identity
from tests.integration.hub import COMMIT, hub_server
from tests.integration.jobs import REPOSITORY, SLOW, parts, run
from tests.integration.stores import FaultyProxy, credentials, free_port, s3_address, s3_server, upload
from tests.models import make_model

CHUNK = 4096
RETRIES = 3
# An actor's part, in a process of its own.
FETCH = f"""
import json, sys
import pipelines.models as models
models.CHUNK_BYTES = {CHUNK}
model, version, files, weights, cache = json.loads(sys.argv[1])
source = models.Source(model, version, tuple(models.StoredFile(*file) for file in files), weights, cache)
print(source.fetch({RETRIES}))
"""
# Both parts, with a hub.
LOOK_AND_FETCH = """
import json, sys
from pipelines.models import look, local_model
from nanovllm import UserError
model, cache = sys.argv[1:3]
try:
    outline = look(model, cache)
    print(json.dumps([str(outline), local_model(model, cache, True, 0) if "fetch" in sys.argv else None]))
except UserError as error:
    print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module", autouse=True)
def signed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Credentials for this process and those it starts, and no other settings of the user's for a store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_CONFIG_FILE", str(tmp_path_factory.mktemp("aws") / "none"))
        patch.delenv("AWS_PROFILE", raising=False)
        patch.delenv("AWS_SESSION_TOKEN", raising=False)
        patch.setenv("RAY_ADDRESS", "local")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        for name, value in credentials().items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory, signed: None) -> Iterator[int]:
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as port:
        yield port


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in two files with an index, and a third file that the index does not name."""
    directory = make_model(tmp_path_factory.mktemp("sharded") / "tiny", tokenizer=True, shards=2)
    shutil.copy(directory / "model-00001-of-00002.safetensors", directory / "consolidated.safetensors")
    return directory


@pytest.fixture
def address(request: pytest.FixtureRequest, s3: int, sharded: Path) -> str:
    """Where a test has the model for itself, past any proxy."""
    path = f"{request.node.name}/tiny"
    upload(sharded, s3_address(s3, path))
    return path


def source_at(model: str, cache: Path) -> Source:
    source = pipelines.models._source(model, str(cache), True)
    assert source is not None
    return source


def fetching(source: Source) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", FETCH, json.dumps(source)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fetched(process: subprocess.Popen[str]) -> Path:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return Path(out.strip())


def gets(proxy: FaultyProxy) -> Counter[tuple[str, int]]:
    """How often each range of each file was asked for."""
    found = ((path.split("?")[0].rpartition("/")[2], first) for method, path, first in proxy.asked if method == "GET")
    return Counter(pair for pair in found if "." in pair[0])


def same(copy: Path, original: Path, *without: str) -> None:
    names = {path.name for path in original.iterdir()} - set(without)
    assert {path.name for path in copy.iterdir() if not path.name.startswith(".")} == names
    for name in names:
        assert (copy / name).read_bytes() == (original / name).read_bytes(), name


def test_two_actors_of_a_node_fetch_each_file_once(s3: int, sharded: Path, address: str, tmp_path: Path) -> None:
    with FaultyProxy(s3, seed=0) as proxy:
        source = source_at(s3_address(proxy.port, address), tmp_path)
        proxy.asked.clear()
        actors = [fetching(source), fetching(source)]
        directories = {fetched(actor) for actor in actors}
        asked = gets(proxy)
        assert directories == {source.place()}
        assert set(asked.values()) == {1}
        size = (sharded / "model-00001-of-00002.safetensors").stat().st_size
        assert sum(name == "model-00001-of-00002.safetensors" for name, _ in asked) == -(-size // CHUNK)
        same(source.place(), sharded, "consolidated.safetensors")  # the index does not name it
        proxy.asked.clear()
        assert source.fetch(0) == str(source.place())
        assert proxy.asked == []


def test_killed_in_the_middle_it_goes_on_at_its_byte(s3: int, sharded: Path, address: str, tmp_path: Path) -> None:
    second = "model-00002-of-00002.safetensors"
    with FaultyProxy(s3, seed=0) as proxy:
        source = source_at(s3_address(proxy.port, address), tmp_path)
        proxy.hold = lambda path, first: second in path and first >= 3 * CHUNK
        actor = fetching(source)
        partial = source.place("part") / f"{second}.part"
        deadline = time.monotonic() + 120
        while not (partial.exists() and partial.stat().st_size == 3 * CHUNK):
            assert actor.poll() is None, actor.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        waiting = fetching(source)  # for the lock, which the other's death lets go of
        actor.send_signal(signal.SIGKILL)
        actor.communicate(timeout=60)
        proxy.asked.clear()
        proxy.hold = lambda path, first: False
        assert fetched(waiting) == source.place()
        assert {name for name, _ in gets(proxy)} == {second}
        assert min(first for _, first in gets(proxy)) == 3 * CHUNK
    same(source.place(), sharded, "consolidated.safetensors")
    assert not source.place("part").exists()


def test_what_is_damaged_is_fetched_again(s3: int, sharded: Path, tmp_path: Path) -> None:
    model = tmp_path / "summed"
    shutil.copytree(sharded, model)
    (model / "consolidated.safetensors").unlink()
    weights = model / "model-00001-of-00002.safetensors"
    good = weights.read_bytes()
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in sorted(model.iterdir())]
    (model / SUMS).write_text("\n".join(lines) + "\n")
    upload(model, s3_address(s3, "good/summed"))
    with FaultyProxy(s3, seed=0) as proxy:
        source = source_at(s3_address(proxy.port, "good/summed"), tmp_path / "cache")
        begun = source.place("part")
        begun.mkdir(parents=True)
        (begun / ".boot").write_text(pipelines.models.boot())
        (begun / f"{weights.name}.part").write_bytes(bytes(1000))  # not what the file begins with
        assert source.fetch(0) == str(source.place())
        same(source.place(), model)
        assert sorted(first for name, first in gets(proxy) if name == weights.name) == [0, 1000]

        os.truncate(source.place() / weights.name, 1000)
        proxy.asked.clear()
        assert source.fetch(0) == str(source.place())
        same(source.place(), model)
        assert {name for name, _ in gets(proxy)} == {weights.name}

    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    upload(model, s3_address(s3, "bad/summed"))
    source = source_at(s3_address(s3, "bad/summed"), tmp_path / "cache")
    with pytest.raises(UserError, match=f"{weights.name} of the model at .* has not the SHA-256 of {SUMS}"):
        source.fetch(0)
    assert not source.place().exists()


def test_a_changed_model_is_fetched_anew(s3: int, sharded: Path, address: str, tmp_path: Path) -> None:
    model = s3_address(s3, address)
    before = source_at(model, tmp_path)
    first = local_model(model, str(tmp_path), True, 0)
    changed = tmp_path / "changed"
    shutil.copytree(sharded, changed)
    (changed / "generation_config.json").write_text("{}")
    upload(changed, model)
    assert local_model(model, str(tmp_path), True, 0) != first
    shutil.rmtree(first)
    with pytest.raises(UserError, match="has changed since the job looked at it"):
        before.fetch(0)


def test_a_store_that_fails_now_and_then(s3: int, sharded: Path, address: str, tmp_path: Path) -> None:
    with FaultyProxy(s3, seed=3) as proxy:
        source = source_at(s3_address(proxy.port, address), tmp_path)
        proxy.rate = 0.1
        assert fetched(fetching(source)) == source.place()
        assert proxy.failed
    same(source.place(), sharded, "consolidated.safetensors")


def test_the_driver_fetches_no_weights(s3: int, tmp_path: Path) -> None:
    local = make_model(tmp_path / "larger", tokenizer=True, intermediate_size=8192, shards=2)
    upload(local, s3_address(s3, "look/larger"))
    heavy = {path.name: path.stat().st_size for path in local.glob("*.safetensors")}
    assert min(heavy.values()) > 4 * EDGE_BYTES
    address = s3_address(s3, "look/larger")
    outline = look(address, str(tmp_path / "cache"))
    assert {path.name: path.stat().st_size for path in outline.glob("*.safetensors")} == heavy
    assert sum(path.stat().st_blocks * 512 for path in outline.glob("*.safetensors")) < 6 * EDGE_BYTES
    assert model_identity(address, str(tmp_path / "cache")) == model_identity(str(local))
    with FaultyProxy(s3, seed=0) as proxy:
        proxied = s3_address(proxy.port, "look/larger")
        look(proxied, str(tmp_path / "other"))
        assert all(count <= 1 for count in gets(proxy).values())
        proxy.asked.clear()
        look(proxied, str(tmp_path / "other"))
        assert gets(proxy) == Counter()  # one list of the directory, no file


def test_a_predictor_of_an_address(sharded: Path, tmp_path: Path) -> None:
    options = {"prompt_column": "prompt", "sampling_params": {"temperature": 0, "max_tokens": 4}, "device": "cpu"}
    prompts = pa.table({"prompt": ["the quick brown fox", "and then"]})
    answers = []
    for model in (str(sharded), f"file://{sharded}"):
        predictor = NanoVLLMPredictor(model, model_cache=str(tmp_path), **options)
        answers.append(asyncio.run(predictor(prompts))["generated_text"].to_pylist())
        del predictor
    assert answers[0] == answers[1]
    assert [path.name.rpartition("-")[0] for path in tmp_path.iterdir() if path.is_dir()] == ["tiny"]


CASES: dict[str, tuple[Callable[[Path, int], Any], str]] = {}


def case(expected: str) -> Callable[[Callable[[Path, int], Any]], None]:
    def register(make: Callable[[Path, int], Any]) -> None:
        CASES[make.__name__] = (make, expected)

    return register


@case("does not exist or holds no model")
def nothing_there(model: Path, s3: int) -> None:
    shutil.rmtree(model)
    model.mkdir()


@case("holds no config.json")
def no_config(model: Path, s3: int) -> None:
    (model / "config.json").unlink()


@case(r"holds no \*.safetensors weights")
def no_weights(model: Path, s3: int) -> None:
    (model / "model.safetensors").unlink()


@case("truncated: it has")
def weights_cut_off(model: Path, s3: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@case("lacks the tensor")
def another_model(model: Path, s3: int) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))


@case("has no tokenizer")
def no_tokenizer(model: Path, s3: int) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()


@case("does not exist or holds no model")
def no_bucket(model: Path, s3: int) -> str:
    return s3_address(s3, "model").replace("bucket", "nowhere")


@case("cannot be reached: .*NETWORK_CONNECTION")
def no_server(model: Path, s3: int) -> str:
    return s3_address(free_port(), "model")


@case(r"'s3://\*\*\*@bucket/.*holds credentials")
def password(model: Path, s3: int) -> str:
    return s3_address(s3, "model").replace("s3://", "s3://user:very-secret@")


@case("no file system for 'nowhere://x'")
def no_scheme(model: Path, s3: int) -> str:
    return "nowhere://x"


@pytest.mark.parametrize("name", CASES)
def test_refused_on_one_line(
    name: str, s3: int, chat_model_dir: Path, dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make, expected = CASES[name]
    model = tmp_path / "model"
    shutil.copytree(chat_model_dir, model)
    address = make(model, s3)
    if address is None:
        address = s3_address(s3, f"refused/{name}")
        upload(model, address)
    output = tmp_path / "out"
    began = time.monotonic()
    status = main(["--model", address, "--input", str(dataset), "--output", str(output)])
    out, err = capfd.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(expected, err), err
    assert "very-secret" not in err
    assert ".outline" not in err
    assert time.monotonic() - began < 60
    assert not output.exists()


def test_a_job_ends_the_same(
    s3: int, chat_model_dir: Path, dataset: Path, undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    upload(chat_model_dir, s3_address(s3, f"job/{chat_model_dir.name}"))
    with FaultyProxy(s3, seed=0) as proxy:
        model = s3_address(proxy.port, f"job/{chat_model_dir.name}")
        job = ["--model", model, "--input", str(dataset), *SLOW, "run.replicas=2", f"run.model_cache={tmp_path}/cache"]
        done = run([*job, "--output", str(tmp_path / "out")], tmp_path)
        assert done.returncode == 0
        weights = [count for (name, _), count in gets(proxy).items() if name == "model.safetensors"]
        assert sum(weights) == 2  # the driver's look, and one actor's download: the file is smaller than two edges
        assert parts(tmp_path / "out") == parts(undisturbed)
        # The model is the same as in its local directory, so the job is.
        assert main([*job, "--output", str(undisturbed)]) == 0
    assert "already finished" in capfd.readouterr().out


def test_a_hub_id(sharded: Path, tmp_path: Path) -> None:
    with hub_server(sharded) as server:
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_ENDPOINT": endpoint, "HOME": str(tmp_path)}
        for name in ("HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE"):
            environment.pop(name, None)

        def ask(*arguments: str, **more: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", LOOK_AND_FETCH, *arguments]
            pipe = subprocess.PIPE
            return subprocess.Popen(command, env={**environment, **more}, stdout=pipe, stderr=pipe, text=True)

        def answer(process: subprocess.Popen[str]) -> Any:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            return json.loads(out.splitlines()[-1])

        cache = str(tmp_path / "cache")
        unknown = ask("someone/else", cache)
        outline, _ = answer(ask("someone/model", cache))
        assert "is no local directory and cannot be fetched from the hub" in answer(unknown)
        weights = {path.name: path.stat().st_size for path in sharded.glob("model-*.safetensors")}
        assert {path.name for path in Path(outline).glob("*.safetensors")} == set(weights)
        assert all(server.whole.get(name, 0) == 0 for name in weights if weights[name] > 100_001)
        server.whole.clear()
        both = [ask("someone/model", cache, "fetch") for _ in range(2)]
        (first, second) = (answer(each)[1] for each in both)
        assert first == second
        assert Path(first).name == COMMIT
        same(Path(first), sharded, "consolidated.safetensors")
        assert {name: server.whole.get(name) for name in weights} == dict.fromkeys(weights, 1)
    assert answer(ask("someone/model", cache, "fetch", HF_HUB_OFFLINE="1"))[1] == first
    assert "someone/other" in answer(ask("someone/other", cache, HF_HUB_OFFLINE="1"))
