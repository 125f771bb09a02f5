"""What the tests of both libraries' vision towers share: weights, views, calls of ops."""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from kernels.runtime import spans
from tests.support.errors import max_error

OPS = ("layer_norm", "linear_quick_gelu", "vision_attention")


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode with every parameter drawn, none left at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = 1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model.eval()


def views(count: int, rows: int, columns: int, patch: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(count, 3, rows * patch, columns * patch, generator=generator)


def ops_called(call: Callable[[], object]) -> Counter:
    """How often `call` called each op of `kernels` that has forms."""
    counts = Counter()

    def count(name: str) -> nullcontext:
        counts[name] += 1
        return nullcontext()

    with spans.use(spans.Ranges(count, lambda name: lambda: None)):
        call()
    return counts


def errs_no_more(half: Tensor, judge: Tensor, expected: Tensor) -> bool:
    """Whether a result in 16 bits is as near to the fp32 one as the library's own in 16 bits."""
    own, theirs = (max_error(x.float(), expected) for x in (half, judge))
    return 1e-3 < own < 1.3 * theirs
