"""Checkpoints into parameters: every parameter bit for bit, whole and sharded, through the readers' threads and buffers."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm.errors import UserError
from nanovllm.layers.backends.torch_backend import TorchBackend
from nanovllm.layers.parallel import TensorParallel
from nanovllm.models.config import ModelConfig
from nanovllm.models.decoder import CausalLM
from nanovllm.models.registry import ARCHITECTURES
from nanovllm.utils import hub, loader
from tests.models import make_model

PARTS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "gate": "gate_proj", "up": "up_proj"}


def build(model_dir: Path, tp: TensorParallel | None = None, dtype: torch.dtype = torch.float32) -> CausalLM:
    """A model whose every number is one that no checkpoint here holds."""
    config = ModelConfig.from_dir(model_dir, ARCHITECTURES)
    model = ARCHITECTURES[config.architecture].load()(config, tp or TensorParallel(), TorchBackend(1, 1, 1), 16)
    model = model.to(dtype)
    for param in model.parameters():
        param.data.fill_(-12345.0)
    return model


def checkpoint(model_dir: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in model_dir.glob("*.safetensors") for name, tensor in load_file(file).items()}


def pieces(model: CausalLM) -> dict[str, torch.Tensor]:
    """The model's parameters under checkpoint names, fused ones taken apart by the row counts of their parts."""
    out: dict[str, torch.Tensor] = {}
    for name, param in model.named_parameters():
        module_name, kind = name.rsplit(".", 1)
        offsets = getattr(model.get_submodule(module_name), "offsets", None)
        if offsets is None:
            out[name] = param.data
        else:
            sizes = [rows for _, rows, _ in offsets.values()]
            for part, rows in zip(offsets, param.data.split(sizes), strict=True):
                out[f"{module_name.rpartition('.')[0]}.{PARTS[part]}.{kind}"] = rows
    return out


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture(params=["plain", "staged"])
def eight_readers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Eight readers whatever the cores; "staged" as on a GPU, with stand-ins for its streams and tiny buffers."""
    seen: dict[str, Any] = {"threads": set(), "pieces": 0, "waits": 0}
    monkeypatch.setattr(loader, "_num_readers", lambda device: 8)
    read = loader._read

    def spy(*args: Any) -> None:
        seen["threads"].add(threading.get_ident())
        read(*args)

    monkeypatch.setattr(loader, "_read", spy)
    if request.param == "plain":
        return seen

    class Event:
        busy = False

        def record(self, stream: Any) -> None:
            seen["pieces"] += 1
            self.busy = True

        def synchronize(self) -> None:
            seen["waits"] += self.busy
            self.busy = False

    class Stream:
        def __init__(self, device: torch.device) -> None:
            pass

    @contextlib.contextmanager
    def copies_to(device: torch.device) -> Any:
        with loader._StagedCopies(device):
            yield

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(loader, "_pinned", lambda size: torch.full((size,), 77, dtype=torch.uint8))
    monkeypatch.setattr(loader, "_copies_to", copies_to)
    monkeypatch.setattr(loader, "STAGING_BYTES", 1000)
    return seen


@pytest.mark.parametrize(
    ("family", "shards", "dtype", "overrides"),
    [
        ("qwen3", 1, "float32", {}),
        ("qwen3", 3, "bfloat16", {"tie_word_embeddings": True}),
        ("qwen2", 4, "float16", {}),
        ("llama", 2, "bfloat16", {"attention_bias": True, "mlp_bias": True}),
    ],
)
def test_every_parameter_equals_the_checkpoint(
    family: str, shards: int, dtype: str, overrides: Any, tmp_path: Path, eight_readers: dict[str, Any]
) -> None:
    path = make_model(tmp_path, family, shards=shards, dtype=dtype, **overrides)
    model = build(path, dtype=getattr(torch, dtype))
    report = loader.load_model(model, path)
    assert_same(pieces(model), checkpoint(path))
    assert report.bytes == sum(t.nbytes for t in checkpoint(path).values())
    assert report.seconds > 0


def test_staged_copies_go_through_the_buffers_in_pieces(
    tmp_path: Path, eight_readers: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    path = make_model(tmp_path, dtype="bfloat16")
    loader.load_model(build(path, dtype=torch.bfloat16), path)
    if request.node.callspec.params["eight_readers"] == "staged":
        # The embedding alone: 257 rows of 96 bytes, ten to a buffer of 1000.
        assert eight_readers["pieces"] > 26
        assert eight_readers["waits"] >= 24  # and a buffer is not filled again while its copy may run
    else:
        assert eight_readers["pieces"] == 0


@pytest.mark.parametrize(
    ("stored", "wanted"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")]
)
def test_types_are_converted(stored: str, wanted: str, tmp_path: Path, eight_readers: dict[str, Any]) -> None:
    path = make_model(tmp_path, shards=2, dtype=stored)
    dtype = getattr(torch, wanted)
    model = build(path, dtype=dtype)
    loader.load_model(model, path)
    assert_same(pieces(model), {name: tensor.to(dtype) for name, tensor in checkpoint(path).items()})


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_two_ranks_hold_the_checkpoint_between_them(
    family: str, tied: bool, tmp_path: Path, eight_readers: dict[str, Any]
) -> None:
    biases = {} if family == "qwen2" else {"attention_bias": True}
    path = make_model(tmp_path, family, shards=2, tie_word_embeddings=tied, **biases)
    ranks = []
    for rank in range(2):
        model = build(path, TensorParallel(rank, 2))
        for module in (model.model.embed_tokens, model.lm_head):
            module.weight.data.zero_()  # as they are made: the odd vocabulary's last row is padding
        loader.load_model(model, path)
        ranks.append(pieces(model))
    whole = checkpoint(path)
    joined = {}
    for name, tensor in whole.items():
        parts = [rank[name] for rank in ranks]
        if "norm" in name or name.endswith("o_proj.bias"):
            assert torch.equal(*parts), name
            joined[name] = parts[0]
        else:
            columns = name.endswith(("o_proj.weight", "down_proj.weight"))
            joined[name] = torch.cat(parts, dim=1 if columns else 0)[: tensor.shape[0]]
            assert all(part.numel() < tensor.numel() for part in parts), name
    assert_same(joined, whole)
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & whole.keys():
        assert ranks[1][name].shape[0] == 129
        assert not ranks[1][name][-1].any()


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_two_ranks_hold_all_experts_between_them(family: str, parallel: bool, tmp_path: Path) -> None:
    path = make_model(tmp_path, family, shards=3)
    config = ModelConfig.from_dir(path, ARCHITECTURES)
    assert config.moe is not None
    config = replace(config, moe=config.moe._replace(parallel=parallel))
    ranks = []
    for rank in range(2):
        model = ARCHITECTURES[config.architecture].load()(config, TensorParallel(rank, 2), TorchBackend(1, 1, 1), 16)
        for param in model.parameters():
            param.data.fill_(-12345.0)
        loader.load_model(model, path)
        assert not any((param == -12345.0).any() for name, param in model.named_parameters() if "mlp" in name)
        ranks.append(model.model.layers[1].mlp)
    whole, size = checkpoint(path), config.moe.intermediate_size
    block, names = "mlp", ("gate_proj", "up_proj", "down_proj")
    if family == "mixtral":
        block, names = "block_sparse_moe", ("w1", "w3", "w2")
    assert torch.equal(ranks[1].gate.weight, whole[f"model.layers.1.{block}.gate.weight"])
    for expert in range(config.moe.num_experts):
        gate, up, down = (whole[f"model.layers.1.{block}.experts.{expert}.{name}.weight"] for name in names)
        if parallel:
            half = config.moe.num_experts // 2
            experts = ranks[expert // half].experts
            assert len(experts.gate_up) == half
            assert torch.equal(experts.gate_up[expert % half], torch.cat((gate, up)))
            assert torch.equal(experts.down[expert % half], down)
        else:
            halves = [rank.experts.gate_up[expert].chunk(2) for rank in ranks]
            assert halves[0][0].shape == (size // 2, 48)
            assert torch.equal(torch.cat([g for g, _ in halves]), gate)
            assert torch.equal(torch.cat([u for _, u in halves]), up)
            assert torch.equal(torch.cat([rank.experts.down[expert] for rank in ranks], dim=1), down)


def test_a_kv_head_that_two_ranks_share(tmp_path: Path, eight_readers: dict[str, Any]) -> None:
    path = make_model(tmp_path, num_key_value_heads=1)
    whole = checkpoint(path)
    for rank in range(2):
        model = build(path, TensorParallel(rank, 2))
        loader.load_model(model, path)
        name = "model.layers.1.self_attn.v_proj.weight"
        assert torch.equal(pieces(model)[name], whole[name])


def test_a_tied_head_stays_the_embedding(tmp_path: Path) -> None:
    """Old checkpoints store the head although it is the embedding; what they store is not taken."""
    path = make_model(tmp_path, tie_word_embeddings=True)
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, "lm_head.weight": torch.full((257, 48), 9.0)}, path / "model.safetensors")
    model = build(path)
    taken = []
    load = model.lm_head.weight.weight_loader  # type: ignore[attr-defined]
    model.lm_head.weight.weight_loader = lambda *args: (taken.append(args), load(*args))  # type: ignore[attr-defined]
    report = loader.load_model(model, path)
    assert len(taken) == 1
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight.data, tensors["model.embed_tokens.weight"])
    assert report.bytes == sum(t.nbytes for t in tensors.values())


def test_parameters_made_in_inference_mode_can_be_filled(tmp_path: Path) -> None:
    path = make_model(tmp_path)
    with torch.inference_mode():
        model = build(path)
        loader.load_model(model, path)
    assert_same(pieces(model), checkpoint(path))


def test_torch_settings_are_left_alone(tmp_path: Path, eight_readers: dict[str, Any]) -> None:
    path = make_model(tmp_path, shards=2)
    before = (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        threading.active_count(),
        len(os.listdir("/proc/self/fd")),
    )
    loader.load_model(build(path), path)
    now = (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        threading.active_count(),
        len(os.listdir("/proc/self/fd")),
    )
    assert now == before
    assert threading.get_ident() not in eight_readers["threads"]


@pytest.mark.parametrize("length", [4, 200, -1])
def test_a_truncated_file_is_one_line(length: int, tmp_path: Path) -> None:
    path = make_model(tmp_path, shards=3)
    file = path / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors is truncated") as caught:
        loader.load_model(build(path), path)
    assert "\n" not in str(caught.value)
    assert "download it again" in str(caught.value)


def test_a_header_that_leaves_a_hole_is_one_line(tmp_path: Path) -> None:
    """What only the safetensors library checks: every byte belongs to a tensor."""
    path = make_model(tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0" * 8)
    with pytest.raises(
        UserError, match=r"model\.safetensors is not a valid safetensors file.*download it again"
    ) as caught:
        loader.load_model(build(path), path)
    assert "\n" not in str(caught.value)


def test_an_index_that_names_a_missing_file(tmp_path: Path) -> None:
    path = make_model(tmp_path, shards=2)
    (path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks the weight file model-00001-of-00002\.safetensors"):
        loader.load_model(build(path), path)


def test_a_failing_reader_stops_the_others_and_reaches_the_caller(
    tmp_path: Path, eight_readers: dict[str, Any]
) -> None:
    path = make_model(tmp_path, num_hidden_layers=40)
    model = build(path)
    failed = threading.Event()
    done = []

    def note(param: Any, tensor: torch.Tensor, part: str | None) -> None:
        assert failed.wait(30)
        time.sleep(0.05)  # the failing reader has gone on to empty the queue by now
        done.append(param)

    def fail(param: Any, tensor: torch.Tensor, part: str | None) -> None:
        failed.set()
        raise UserError("no room on the device")

    for param in model.parameters():
        param.weight_loader = note  # type: ignore[attr-defined]
    # With the head the largest tensor, so one of the first two taken.
    model.model.embed_tokens.weight.weight_loader = fail  # type: ignore[attr-defined]
    before = threading.active_count()
    with pytest.raises(UserError, match=r"^no room on the device$"):
        loader.load_model(model, path)
    assert len(done) < 50  # of 443: what each had in hand, and a few more on a slow machine
    assert threading.active_count() == before


def test_headers_say_shape_and_size(tmp_path: Path) -> None:
    path = make_model(tmp_path, dtype="bfloat16")
    header = loader.read_header(path / "model.safetensors")
    found = {name: (info.shape, info.nbytes) for name, info in header.items()}
    assert found == {name: (tuple(tensor.shape), tensor.nbytes) for name, tensor in checkpoint(path).items()}


@pytest.mark.parametrize(("cores", "threads", "readers"), [(16, 1, 8), (16, 4, 4), (16, 16, 1), (2, 16, 1), (3, 1, 3)])
def test_readers_never_outnumber_cores(cores: int, threads: int, readers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert loader._num_readers(torch.device("cpu")) == readers
    assert loader._num_readers(torch.device("cuda", 0)) == min(8, cores)


def test_dummy_weights_follow_from_seed_and_name(tmp_path: Path) -> None:
    path = make_model(tmp_path, "qwen2", attention_bias=True)
    deep = make_model(tmp_path / "deep", "qwen2", attention_bias=True, num_hidden_layers=3)
    first, again, other, deeper = build(path), build(path), build(path), build(deep)
    loader.init_dummy(first)
    loader.init_dummy(again)
    loader.init_dummy(other, seed=1)
    loader.init_dummy(deeper)
    heads = set()
    matrices = 0
    for name, param in first.named_parameters():
        assert torch.equal(param, again.get_parameter(name)), name
        if param.dim() == 1:
            assert (param == (0 if name.endswith("bias") else 1)).all(), name
            continue
        matrices += 1
        heads.add(tuple(param.flatten()[:4].tolist()))
        assert not torch.equal(param, other.get_parameter(name)), name
        assert torch.equal(param, deeper.get_parameter(name)), name
        assert 0.015 < param.std() < 0.025 and abs(param.mean()) < 0.005, name
    assert len(heads) == matrices > 8


def test_a_hub_id_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[str] = []

    def fetch(model: str, **options: Any) -> str:
        calls.append(model)
        if len(calls) == 1:
            raise OSError("no network\nsecond line")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    hub._download.cache_clear()
    with pytest.raises(UserError, match=r"cannot be fetched from the hub: no network$"):
        hub.resolve_model("someone/some-model")
    assert hub.resolve_model("someone/some-model") == tmp_path
    assert hub.resolve_model("someone/some-model") == tmp_path
    assert len(calls) == 3  # once small files, once weights; a failure is not remembered
    hub._download.cache_clear()
