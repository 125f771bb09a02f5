"""Triton kernels without a GPU: what the ops would launch, recorded, and compiled ahead of time.

    with launches_recorded(H200) as launches:
        rms_norm(x, weight, eps=1e-6, impl="triton")  # tensors on a CPU; its output is not written
    with compiler(H200):
        compiled = [launch.compile() for launch in launches]

Needs a process in which Triton does not interpret.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels.runtime.configs import Gpu, assume_gpu
from kernels.runtime.dispatch import without_gpu


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments it was to be launched with."""

    kernel: JITFunction
    args: tuple
    kwargs: dict

    def compile(self) -> triton.compiler.CompiledKernel:
        """The kernel for these arguments, of a `compiler`'s GPU.

        Under triton.AsyncCompileMode it has the compiled kernel as its `result()`.
        """
        return self.kernel.run(*self.args, grid=None, warmup=True, **self.kwargs)


@contextmanager
def launches_recorded(gpu: Gpu) -> Iterator[list[Launch]]:
    """Let `impl="triton"` take CPU tensors and record its launches, in the tiles of `gpu`."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: object, grid: object, warmup: bool, **kwargs) -> None:
        launches.append(Launch(kernel, args, kwargs))

    run, JITFunction.run = JITFunction.run, record
    token = without_gpu.set(True)
    try:
        with assume_gpu(gpu):
            yield launches
    finally:
        without_gpu.reset(token)
        JITFunction.run = run


@contextmanager
def compiler(gpu: Gpu) -> Iterator[None]:
    """Make Triton compile for `gpu`, whatever is present."""
    before = driver._active  # there is no public way to put back what was active
    driver.set_active(_Target(gpu.arch))
    try:
        yield
    finally:
        driver._active = before


@dataclass(frozen=True)
class _Target:
    """What Triton asks its driver for when it compiles.

    Triton keeps compiled kernels by device: the architecture stands for one, as no machine has 80.
    """

    arch: int

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0
