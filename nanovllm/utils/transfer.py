"""Copies between host and device that never make the host wait: through pinned memory, in the order of the stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def to_device(array: npt.NDArray[Any], device: torch.device, out: torch.Tensor | None = None) -> torch.Tensor:
    """`array` on `device`, in `out` where given. Torch's pinned allocator keeps the staging buffer until the copy is done."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cpu":
        tensor = tensor.pin_memory()
    if out is not None:
        return out.copy_(tensor, non_blocking=True)
    return tensor.to(device, non_blocking=True)


class HostCopy:
    """A device tensor on its way to the host."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.event: torch.cuda.Event | None = None
        self.tensor = tensor
        if tensor.is_cuda:
            self.tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.tensor.copy_(tensor, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def ready(self) -> bool:
        """Whether `tolist` would return at once."""
        return self.event is None or self.event.query()

    def tolist(self) -> list[Any]:
        """The values, once they have arrived; nested as the tensor is."""
        if self.event is not None:
            self.event.synchronize()
        values: list[Any] = self.tensor.tolist()
        return values
