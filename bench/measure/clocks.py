"""A GPU's clocks while it is timed, read from the driver's library NVML.

Times of a GPU that slows down because it is hot, or because its power supply asks for it, are not
those of the kernel: they are refused. A GPU at its power limit lowers its clocks, too, and large
products always reach it; such times count, and their row has the lowest and the highest clock.
"""

import ctypes
from functools import cache
from typing import Any

import torch

SM_CLOCK = 1  # NVML_CLOCK_SM
# Bits of nvmlDeviceGetCurrentClocksThrottleReasons (nvml.h) for slowdowns that are not a limit
# which every run of the kernel meets.
REASONS = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


class Clocks:
    """Samples of a GPU's SM clock; of nothing on a CPU, or where NVML cannot tell."""

    def __init__(self, device: torch.device | str) -> None:
        self._nvml = nvml(torch.device(device))
        self._mhz: list[int] = []
        self._reasons = 0

    def sample(self) -> None:
        if self._nvml is None:
            return
        library, handle = self._nvml
        mhz, reasons = ctypes.c_uint(), ctypes.c_ulonglong()
        if not library.nvmlDeviceGetClockInfo(handle, SM_CLOCK, ctypes.byref(mhz)):
            self._mhz.append(mhz.value)
        if not library.nvmlDeviceGetCurrentClocksThrottleReasons(handle, ctypes.byref(reasons)):
            self._reasons |= reasons.value

    @property
    def sm_mhz(self) -> tuple[int, int] | None:
        """The lowest and highest sample."""
        return (min(self._mhz), max(self._mhz)) if self._mhz else None

    @property
    def slowed(self) -> str | None:
        """Why the GPU slowed down, or None."""
        reasons = [text for bit, text in REASONS.items() if self._reasons & bit]
        if not reasons:
            return None
        clocks = f", {min(self._mhz)} to {max(self._mhz)} MHz" if self._mhz else ""
        return f"the GPU slowed down while it was timed: {', '.join(reasons)}{clocks}"


@cache
def nvml(device: torch.device) -> tuple[Any, ctypes.c_void_p] | None:
    """NVML and its handle of a GPU; None on a CPU, without NVML, or if it does not know the GPU."""
    if device.type != "cuda":
        return None
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle = ctypes.c_void_p()
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
        return None
    return library, handle
