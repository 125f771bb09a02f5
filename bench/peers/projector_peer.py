"""The projector by cuDNN's convolutions at their best: its algorithms chosen by measurement.

The op's PyTorch forms take what cuDNN's heuristics choose. The measurement is made at the first
call of a shape, which is not timed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.peers.layout import Unavailable
from kernels.projector import projector


def cudnn(inputs: dict, *, folded: bool = False) -> Callable[[], Tensor]:
    """The three layers as they are, or with the last two `folded` into one."""
    if not torch.backends.cudnn.is_available():
        raise Unavailable("needs cuDNN")
    given = inputs if folded else inputs | {"folded": None}

    def call() -> Tensor:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            return projector(**given, impl="portable")
        finally:
            torch.backends.cudnn.benchmark = before

    return call
