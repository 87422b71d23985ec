"""The engine's log: lines on standard error, unless the program has set up logging by itself."""

from __future__ import annotations

import logging


def get_logger(name: str) -> logging.Logger:
    """The logger of a module of this package, visible from INFO on where nothing else handles it."""
    package = logging.getLogger("nanovllm")
    if not package.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
        package.addHandler(handler)
        package.setLevel(logging.INFO)
        # A program that sets up logging later would print every line twice.
        package.propagate = False
    return logging.getLogger(name)
