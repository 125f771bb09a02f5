"""Script that launches kernels through Triton's driver with a stub of libcuda (stub_libcuda.c).

    python -m tests.support.stub_launches SITES   # a pickle; LD_LIBRARY_PATH leads to the stub

Prints as JSON what was launched, and which arguments arrived wrong. Tests run it in a separate
process, because pytest's process interprets Triton. TRITON_KEY_OF_ANOTHER_WHEEL in the environment
replaces `triton_key`.
"""

import ctypes
import json
import os
import pickle
import struct
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch
import triton
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import cache, driver
from triton.runtime.jit import JITFunction

from kernels.compile.unfilled import unfilled
from kernels.errors import ImplError
from kernels.runtime.configs import H200, assume_gpu
from kernels.runtime.dispatch import without_gpu

INTEGERS = {"1": 1, "8": 1, "16": 2, "32": 4, "64": 8}  # bytes, by the end of a type's name
SCRATCH = [(8, 0), (8, 0)]  # parameters that Triton adds, unused here


class Last(ctypes.Structure):
    """The struct `stub_last` of stub_libcuda.c."""

    _fields_ = [
        ("launches", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("params", ctypes.c_uint32),
        ("values", ctypes.c_uint64 * 256),
        ("name", ctypes.c_char * 256),
    ]


class Driver(CudaDriver):
    """Triton's driver for an H200, with fixed answers instead of PyTorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device=None: 0
        self.get_device_capability = lambda device=None: (9, 0)


class Checked:
    """`JITFunction.run` with a check of what arrived with each launch."""

    def __init__(self) -> None:
        self.last = Last.in_dll(ctypes.CDLL("libcuda.so.1"), "stub_last")
        self.run, self.wrong = JITFunction.run, []
        self.launches: Counter[str] = Counter()

    def __call__(self, kernel: JITFunction, *args: object, grid: object, **options) -> object:
        before = self.last.launches
        compiled = self.run(kernel, *args, grid=grid, **options)
        keywords = {name: options[name] for name in kernel.arg_names if name in options}
        bound = kernel.signature.bind(*args, **keywords)
        bound.apply_defaults()
        expected = {
            "launches": before + 1,
            "name": compiled.metadata.name,
            "grid": [*grid, 1, 1][:3],
            "block": [32 * compiled.metadata.num_warps, 1, 1],
            "shared": compiled.metadata.shared,
            "parameters": parameters(compiled.src.signature, bound.arguments) + SCRATCH,
        }
        arrived = self.arrived([size for size, _ in expected["parameters"]])
        self.wrong += [
            f"{compiled.metadata.name}: {what} {arrived[what]}, not {expected[what]}"
            for what in expected
            if arrived[what] != expected[what]
        ]
        self.launches[compiled.metadata.name] += 1
        return compiled

    def arrived(self, sizes: list[int]) -> dict:
        """What the stub received: of the parameters, which have these sizes, those that the cubin
        declares."""
        last = self.last
        sizes = [*sizes, *[8] * last.params][: last.params]
        return {
            "launches": last.launches,
            "name": last.name.decode(),
            "grid": list(last.grid),
            "block": list(last.block),
            "shared": last.shared,
            "parameters": [(n, v % 2 ** (8 * n)) for n, v in zip(sizes, last.values, strict=False)],
        }


def parameters(types: object, values: object) -> list[tuple[int, int]]:
    """Arguments as kernel parameters (bytes, bits), without constexprs, which are compiled in."""
    if isinstance(types, dict):
        types, values = tuple(types.values()), tuple(values[name] for name in types)
    if isinstance(types, tuple):
        pairs = zip(types, values, strict=True)
        return [parameter for pair in pairs for parameter in parameters(*pair)]
    if types == "constexpr":
        return []
    if types.startswith("*"):
        return [(8, values.data_ptr())]
    if types == "fp32":
        return [(4, int.from_bytes(struct.pack("<f", values), "little"))]
    size = next(n for end, n in reversed(INTEGERS.items()) if types.endswith(end))
    return [(size, int(values) % 2 ** (8 * size))]


def launch_all(sites: list) -> dict:
    """Run the sites as on a GPU. Returns the launches by kernel, wrong arguments, and hits and
    misses of Triton's cache."""
    driver.set_active(Driver())
    lookups: Counter[bool] = Counter()
    triton.knobs.compilation.listener = lambda cache_hit, **_: lookups.update([cache_hit])
    checked = Checked()
    JITFunction.run = lambda kernel, *args, **options: checked(kernel, *args, **options)
    without_gpu.set(True)
    with assume_gpu(H200), unfilled(), torch.inference_mode():
        for site in sites:
            with suppress(ImplError):
                site()
    return {
        "launches": checked.launches,
        "wrong": checked.wrong,
        "hits": lookups[True],
        "misses": lookups[False],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    if other := os.environ.get("TRITON_KEY_OF_ANOTHER_WHEEL"):
        cache.triton_key = lambda: other
    print(json.dumps(launch_all(pickle.loads(Path(sys.argv[1]).read_bytes()))))
