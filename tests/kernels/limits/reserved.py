"""Memory for tests of large offsets: address space that is reserved, and read as zeros, but takes
only what is written."""

import math
import mmap

import pytest
import torch
from torch import Tensor

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.11 has no name for it
BEFORE = 2**31  # elements: as far below its tensor as a wrapped int32 offset can point


def reserved(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros of `shape`; an offset that wraps around in int32 stays within the reserved memory.

    Skips the test where the system reserves no more memory than it has.
    """
    elements, size = math.prod(shape), dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, (BEFORE + elements) * size, flags=flags)
    except OSError as error:
        pytest.skip(f"this system does not reserve {elements * size >> 30} GiB: {error}")
    data = torch.frombuffer(memory, dtype=torch.uint8, offset=BEFORE * size)
    return data.view(dtype).view(shape)
