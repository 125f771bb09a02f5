"""What a peer is: another way to an op's result, and the library behind it."""

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
    """Why a peer cannot take part: it is not installed, or does not offer what is asked for."""


@dataclass(frozen=True)
class Library:
    """What peers call. `check` raises Unavailable if it cannot be used on a device."""

    name: str
    get: str  # how to come by it, in a few words
    version: Callable[[], str | None]  # as in "xformers 0.0.35"; None if it is not there
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
    """A comparator of an op.

    `prepare` takes the op's inputs and returns the call to time, or raises Unavailable; what it
    does before is not timed. Unless somebody asks for it, it is timed on a CPU only if `on_cpu`.
    """

    name: str
    op: str
    prepare: Prepare
    library: Library
    on_cpu: bool = False

    def __call__(self, inputs: dict) -> Call:
        return self.prepare(inputs)


def distribution(*packages: str) -> Callable[[], str | None]:
    """The version of the first of `packages` that is installed."""

    def version() -> str | None:
        for package in packages:
            try:
                return f"{package} {installed(package)}"
            except PackageNotFoundError:
                continue
        return None

    return version


def imported(module: str) -> ModuleType:
    """The module; Unavailable if it, or what it needs, is not there."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a shared object without its CUDA
        raise Unavailable(f"not installed ({str(error).splitlines()[0]})") from None


def halves(inputs: dict) -> Tensor:
    """silu_mul's [gate | up]; Unavailable if they are interleaved."""
    if inputs["interleaved"]:
        raise Unavailable("takes gate and up as halves only")
    return inputs["gate_up"]


def on_gpu(device: torch.device) -> None:
    """Raises Unavailable elsewhere."""
    if device.type != "cuda":
        raise Unavailable("needs a GPU")


TORCH = Library("torch", "is here", lambda: f"torch {torch.__version__}")
TORCH_GPU = Library("torch", "a GPU", TORCH.version, on_gpu)
