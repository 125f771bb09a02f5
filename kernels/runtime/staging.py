"""Asynchronous copies of small host arrays to the device, many in one copy.

A copy from pageable memory makes the host wait for all queued work of the device. A copy from
pinned memory does not, and PyTorch reuses pinned memory only once the copy is done.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from kernels.runtime.arithmetic import cdiv

ALIGNMENT = 16  # bytes: Triton compiles a kernel again for pointers with less


class Packed:
    """Tensors of one dtype in one device buffer, at fixed addresses.

    `tensors` has the views of the buffer by name; `fill` overwrites them.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        dtype: torch.dtype = torch.int32,
        device: torch.device | str,
    ) -> None:
        self._ranges: dict[str, tuple[int, int]] = {}
        step, end = ALIGNMENT // dtype.itemsize, 0
        for name, shape in shapes.items():
            size = int(np.prod(shape))
            self._ranges[name] = end, size
            end += cdiv(size, step) * step
        self._buffer = torch.zeros(end, dtype=dtype, device=device)
        self.tensors = {
            name: self._buffer[start : start + size].view(shapes[name])
            for name, (start, size) in self._ranges.items()
        }

    def fill(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Overwrite each tensor with an array, followed by zeros if the array is shorter.

        Asynchronous on a GPU, in stream order. Raises ValueError if an array has more elements than
        its tensor; nothing is then written.
        """
        for name, (_, size) in self._ranges.items():
            if arrays[name].size > size:
                raise ValueError(f"{name} takes at most {size} values, got {arrays[name].size}")
        staging = self._buffer
        if staging.is_cuda:
            staging = torch.zeros(staging.shape, dtype=staging.dtype, pin_memory=True)
        host = staging.numpy()
        for name, (start, size) in self._ranges.items():
            values = arrays[name].reshape(-1)
            host[start : start + len(values)] = values
            host[start + len(values) : start + size] = 0
        if staging is not self._buffer:
            self._buffer.copy_(staging, non_blocking=True)


def on_device(values: np.ndarray, device: torch.device | str) -> Tensor:
    """Copy an array to a tensor of its dtype on `device`, without waiting for the device."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
