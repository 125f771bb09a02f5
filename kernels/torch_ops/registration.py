"""Defines an operator of PyTorch from a typed function and its fake form.

The kernels are opaque to the compiler (no `torch.library.triton_op`): launchers choose a kernel
config from shapes, alignment and the plan on the host, which cannot be traced, and Inductor fuses
nothing into a Triton kernel of ours anyway. They are defined by `Library.define` rather than by
`torch.library.custom_op`, which adds Python layers for autograd to every call.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch

from kernels.runtime.dispatch import refuse_grad

NAMESPACE = "pacore"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_NAMES: list[str] = []


def names() -> tuple[str, ...]:
    """The registered operators, without their namespace."""
    return tuple(_NAMES)


def torch_op(
    fake: Callable, mutates: Sequence[str] = (), tags: Sequence[torch.Tag] = ()
) -> Callable[[Callable], Callable]:
    """Register the decorated function under its name.

    Its annotations and defaults give the operator's schema. No result may share memory with an
    argument or with another result. Results become contiguous, as PyTorch's forms of an op need
    not be when an input is not.

    fake: takes the same arguments; returns contiguous results of the right shapes and dtypes
    mutates: the arguments that are written in place
    tags: besides those of all
    """

    def register(function: Callable) -> Callable:
        name = function.__name__
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        _LIBRARY.define(name + schema, tags=(*_TAGS, *tags))
        _LIBRARY.impl(name, _contiguous(function), "CompositeExplicitAutograd")

        @wraps(fake)
        def checked(*arguments: Any, **options: Any) -> Any:
            refuse_grad(name, (*arguments, *options.values()))
            return fake(*arguments, **options)

        torch.library.register_fake(f"{NAMESPACE}::{name}", checked, lib=_LIBRARY)
        _NAMES.append(name)
        return function

    return register


def _contiguous(function: Callable) -> Callable:
    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        if isinstance(result, tuple):
            return tuple(x.contiguous() for x in result)
        return result if result is None else result.contiguous()

    return call
