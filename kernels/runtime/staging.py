"""Small host arrays on their way to the device: many in one copy, which nobody waits for.

A copy from ordinary memory makes the host wait for all that the device still has to do. From pinned
memory it does not, and PyTorch gives such memory out again only when the copy is done.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from kernels.runtime.arithmetic import cdiv

ALIGNMENT = 16  # bytes: Triton compiles a kernel anew for pointers that stand on fewer


class Packed:
    """Arrays of one dtype in one device buffer, at addresses that do not change.

    `tensors` are views of it, by name. `fill` overwrites them.
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
        """Overwrite the beginning of each tensor by an array, what lies behind it by zeros.

        Asynchronous on a GPU, in the order of its stream. Raises ValueError for an array with more
        elements than there is room for; nothing is then written.
        """
        for name, (_, size) in self._ranges.items():
            if arrays[name].size > size:
                raise ValueError(f"{name}: {arrays[name].size} values, room for {size}")
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
    """An array as a tensor of its dtype on `device`, without waiting for the device."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
