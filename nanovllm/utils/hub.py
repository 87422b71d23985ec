"""Where a model's files are: a local directory as given, or a hub id fetched into the hub's own cache."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

from nanovllm.errors import UserError

# What an engine reads of a model's directory, by the end of the name.
SMALL_FILES = (".json", ".model", ".txt", ".jinja")
WEIGHTS = ".safetensors"
INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")


def resolve_model(model: str) -> Path:
    """Directory of `model`, downloading a hub id where it is not in the cache yet.

    Raises:
        UserError: no such directory, and not a hub id that can be fetched.
    """
    return Path(model).expanduser() if is_local(model) else _download(model)


def is_local(model: str) -> bool:
    """Whether `model` is a directory of this machine; else it is a hub id.

    Raises:
        UserError: it is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return True
    if path.exists():
        raise UserError(
            f"model {model!r} is a file; give the directory that holds config.json and *.safetensors, or a hub id"
        )
    if model.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(model):
        raise UserError(
            f"model directory {model!r} does not exist; give a directory that holds config.json, or a hub id"
        )
    return False


def index_names(model_dir: Path) -> list[str] | None:
    """The weight files that a model's index names; None where there is no index, or one that cannot be read."""
    try:
        return sorted(set(json.loads((model_dir / INDEX).read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def fetch(model: str, weights: bool = True, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """The snapshot of a hub id, whose name is its commit: what is not in the cache is downloaded, or goes on where it broke off.

    Args:
        model: hub id.
        weights: whether the weights are wanted; of them only the files that the index names, where there is one.
        revision: branch, tag or commit; the main branch where None.
        cache_dir: instead of the hub's own.

    Raises:
        Exception: of the hub client's many kinds.
    """
    from huggingface_hub import snapshot_download

    def snapshot(patterns: list[str], revision: str | None) -> Path:
        return Path(snapshot_download(model, allow_patterns=patterns, revision=revision, cache_dir=cache_dir))

    found = snapshot([f"*{end}" for end in SMALL_FILES], revision)
    return snapshot(index_names(found) or [f"*{WEIGHTS}"], found.name) if weights else found


@cache
def _download(model: str) -> Path:
    """The snapshot of a hub id. Asked once a process: it is a network call, and all of an engine must see one snapshot."""
    try:
        return fetch(model)
    except Exception as error:  # each of them means that the model cannot be had
        raise UserError(
            f"model {model!r} is no local directory and cannot be fetched from the hub: {reason(error)}"
        ) from None


def reason(error: BaseException) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
