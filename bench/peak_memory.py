"""The peak memory of a piece of work, on a GPU of PyTorch's allocator, on a CPU of the process."""

import ctypes
import gc
from pathlib import Path

import torch

from model.errors import InputError

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def start(device: torch.device) -> int:
    """Start to record the peak; returns the bytes in use now.

    Raises InputError where a CPU's memory cannot be measured.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what earlier work freed
    try:
        CLEAR.write_text("5")  # see proc(5): the peak becomes what is resident now
    except OSError:
        raise InputError(f"cannot measure a CPU's memory here: {CLEAR} is not Linux's") from None
    return _resident("VmRSS")


def peak(device: torch.device) -> int:
    """The most bytes in use since `start`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM")


def _resident(name: str) -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024
