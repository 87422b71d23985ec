"""Where a model's files are: a local directory as given, or a hub id fetched into the hub's own cache."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from nanovllm.errors import UserError

_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")


def resolve_model(model: str) -> Path:
    """Directory of `model`, downloading a hub id where it is not in the cache yet.

    Raises:
        UserError: no such directory, and not a hub id that can be fetched.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(
            f"model {model!r} is a file; give the directory that holds config.json and *.safetensors, or a hub id"
        )
    if model.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(model):
        raise UserError(
            f"model directory {model!r} does not exist; give a directory that holds config.json, or a hub id"
        )
    return _download(model)


@cache
def _download(model: str) -> Path:
    """The snapshot of a hub id. Asked once a process: it is a network call, and all of an engine must see one snapshot."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(_FILES)))
    except Exception as error:  # the hub client raises many kinds; each means that the model cannot be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model {model!r} is no local directory and cannot be fetched from the hub: {reason}") from None
