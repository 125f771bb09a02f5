"""A peer (another library's implementation of an op) and the library that it calls."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from types import ModuleType

import torch
from torch import Tensor

Call = Callable[[], object]
Prepare = Callable[[dict], Call]  # from an op's inputs to the call to time


class Unavailable(Exception):
    """Why a peer cannot be timed: it is not installed, or does not support the inputs."""


@dataclass(frozen=True)
class Library:
    """A library that peers call. `check` raises Unavailable if it cannot be used on a device."""

    name: str
    get: str  # how to get it, in a few words
    version: Callable[[], str | None]  # as in "xformers 0.0.35"; None if it is not installed
    check: Callable[[torch.device], object] = lambda device: None

    def absence(self, device: torch.device) -> str | None:
        """Why the library cannot be used on `device`; None if it can."""
        try:
            self.check(device)
        except Unavailable as reason:
            return str(reason)
        return None


@dataclass(frozen=True)
class Peer:
    """Another library's implementation of an op.

    `prepare` takes the op's inputs and returns the call to time, or raises Unavailable; its own
    work is not timed. By default a peer is timed on a CPU only if `on_cpu`.
    """

    name: str
    op: str
    prepare: Prepare
    library: Library
    on_cpu: bool = False
    # False if a part of its work on the inputs is done before the timed call, or if it works in
    # place on copies: its results do not follow its inputs from call to call.
    audited: bool = True

    def __call__(self, inputs: dict) -> Call:
        return self.prepare(inputs)


def distribution(*packages: str) -> Callable[[], str | None]:
    """A function that returns the version of the first of `packages` that is installed."""

    def version() -> str | None:
        for package in packages:
            try:
                return f"{package} {installed(package)}"
            except PackageNotFoundError:
                continue
        return None

    return version


def imported(module: str) -> ModuleType:
    """The module; raises Unavailable if it, or something it needs, is not installed."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a shared object whose CUDA is missing
        raise Unavailable(f"not installed ({str(error).splitlines()[0]})") from None


def halves(inputs: dict) -> Tensor:
    """silu_mul's [gate | up]; raises Unavailable if they are interleaved."""
    if inputs["interleaved"]:
        raise Unavailable("supports gate and up only as halves")
    return inputs["gate_up"]


def on_gpu(device: torch.device) -> None:
    """Raises Unavailable for other devices than a GPU."""
    if device.type != "cuda":
        raise Unavailable("needs a GPU")


TORCH = Library("torch", "already installed", lambda: f"torch {torch.__version__}")
TORCH_GPU = Library("torch", "a GPU", TORCH.version, on_gpu)
