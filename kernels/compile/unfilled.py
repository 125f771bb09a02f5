"""A context in which large tensors are allocated but not filled, for recording launches.

Recording needs only shapes and addresses, and memory pages that are never touched cost neither time
nor memory.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def unfilled() -> Iterator[None]:
    """Skip filling large float tensors and computing large matrix products."""
    with _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    LARGE = 1 << 20  # elements

    def __torch_function__(self, func, types, args=(), kwargs=None) -> object:  # noqa: ANN001
        kwargs = kwargs or {}
        if not args:
            return func(**kwargs)
        name, x = func.__name__, args[0]
        fills = name == "randn" or (name == "full" and isinstance(args[1], float))
        if fills and math.prod(x) >= self.LARGE:
            return torch.empty(x, dtype=kwargs.get("dtype"), device=kwargs.get("device"))
        if name == "linear" and args[1].numel() >= self.LARGE:
            return x.new_empty(*x.shape[:-1], len(args[1]))
        if not (torch.is_tensor(x) and x.is_floating_point() and x.numel() >= self.LARGE):
            return func(*args, **kwargs)
        if name in ("mul_", "masked_fill_", "normal_"):
            return x
        if name == "__setitem__":
            return None
        if name == "contiguous":
            return torch.empty_like(x, **kwargs)
        if name == "to" and (isinstance(args[-1], torch.dtype) or kwargs.get("copy")):
            return torch.empty_like(x, dtype=args[-1])
        if name == "matmul":  # used by the projector's `fold`
            return x.new_empty(*x.shape[:-1], *args[1].shape[1:])
        return func(*args, **kwargs)
