"""The projector by cuDNN's convolutions at their best: its algorithms chosen by measurement.

The op's PyTorch forms take what cuDNN's heuristics choose. The measurement is made at the first
call of a shape, which is not timed. PyTorch remembers one algorithm for a shape, measured or not,
whoever came first; but apart for calls that must be deterministic. So these are: their algorithms
are not those of the forms before them, and they sum in a fixed order, as this project's kernels do.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.peers.peer import Library, Unavailable, on_gpu
from kernels.projector import projector


def cudnn(inputs: dict, *, folded: bool = False) -> Callable[[], Tensor]:
    """The three layers as they are, or with the last two `folded` into one."""
    check(inputs["x"].device)
    settings = torch.backends.cudnn
    given = inputs if folded else inputs | {"folded": None}

    def call() -> Tensor:
        before = settings.benchmark, settings.deterministic
        settings.benchmark = settings.deterministic = True
        try:
            return projector(**given, impl="portable")
        finally:
            settings.benchmark, settings.deterministic = before

    return call


def check(device: torch.device) -> None:
    """Raises Unavailable without a GPU, or without cuDNN, which torch for CUDA brings along."""
    on_gpu(device)
    if not torch.backends.cudnn.is_available():
        raise Unavailable("needs cuDNN")


def version() -> str | None:
    there = torch.backends.cudnn.is_available()
    return f"cudnn {torch.backends.cudnn.version()}" if there else None


CUDNN = Library("cuDNN", "a torch for CUDA, which brings it along", version, check)
