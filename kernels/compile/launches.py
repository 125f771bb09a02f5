"""Records the Triton launches of ops without a GPU, and compiles them ahead of time.

    with launches_recorded(H200) as launches:
        rms_norm(x, weight, eps=1e-6, impl="triton")  # CPU tensors; the output is not written
    with compiler(H200):
        compiled = [launch.compile() for launch in launches]

Does not work in a process that runs Triton's interpreter.
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
    """A kernel and the arguments of one launch."""

    kernel: JITFunction
    args: tuple
    kwargs: dict

    def compile(self) -> triton.compiler.CompiledKernel:
        """Compile the kernel for these arguments; call it inside `compiler`, which sets the GPU.

        Under triton.AsyncCompileMode the compiled kernel is the `result()` of what this returns.
        """
        return self.kernel.run(*self.args, grid=None, warmup=True, **self.kwargs)


@contextmanager
def launches_recorded(gpu: Gpu) -> Iterator[list[Launch]]:
    """Let `impl="triton"` take CPU tensors, and record its launches with the configs of `gpu`."""
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
    """Make Triton compile for `gpu`, even if it is absent."""
    before = driver._active  # there is no public way to restore the active driver
    driver.set_active(_Target(gpu.arch))
    try:
        yield
    finally:
        driver._active = before


@dataclass(frozen=True)
class _Target:
    """The part of a Triton driver that compilation uses.

    Triton caches compiled kernels by device number, for which this uses the architecture: no
    machine has 80 devices.
    """

    arch: int

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0
