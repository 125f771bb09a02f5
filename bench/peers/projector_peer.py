"""The projector with cuDNN's convolutions, whose algorithms are chosen by measurement.

The op's PyTorch forms use the algorithms that cuDNN's heuristics choose. Here cuDNN measures them
at the first call of a shape, which is not timed. PyTorch remembers one algorithm per shape, that of
the first call, measured or not, but separately for calls that must be deterministic. So these calls
are deterministic: they do not reuse algorithms of forms that ran before, and they sum in a fixed
order, as this project's kernels do.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.peers.peer import Library, Unavailable, on_gpu
from kernels.projector import projector


def cudnn(inputs: dict, *, folded: bool = False) -> Callable[[], Tensor]:
    """The three layers, or with the last two `folded` into one."""
    check(inputs["x"].device)
    settings = torch.backends.cudnn
    arguments = inputs if folded else inputs | {"folded": None}

    def call() -> Tensor:
        before = settings.benchmark, settings.deterministic
        settings.benchmark = settings.deterministic = True
        try:
            return projector(**arguments, impl="portable")
        finally:
            settings.benchmark, settings.deterministic = before

    return call


def check(device: torch.device) -> None:
    """Raises Unavailable without a GPU, or without cuDNN, which is part of torch for CUDA."""
    on_gpu(device)
    if not torch.backends.cudnn.is_available():
        raise Unavailable("needs cuDNN")


def version() -> str | None:
    available = torch.backends.cudnn.is_available()
    return f"cudnn {torch.backends.cudnn.version()}" if available else None


CUDNN = Library("cuDNN", "a torch for CUDA, which includes it", version, check)
