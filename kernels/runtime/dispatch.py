"""Choice of an op's implementation, and checks of its arguments."""

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from kernels.errors import ImplError
from kernels.runtime.spans import spanned

IMPLS = ("eager", "portable", "triton")


# Set by kernels/compile/launches.py, which records launches of Triton kernels instead of running
# them.
without_gpu: ContextVar[bool] = ContextVar("without_gpu", default=False)


def pick(op: str, impl: str | None, device: torch.device, forms: dict[str, Callable]) -> Callable:
    """The form of `op` to run on `device`.

    `forms` maps names from IMPLS to callables and always has "eager", the definition. "portable" is
    the fastest PyTorch form, by default the definition. `impl=None` takes Triton on CUDA if the op
    has it, else portable; a named form never falls back to another. While spans are on, each call
    is a span named `op`. Raises ImplError if the named form does not exist or cannot run on
    `device`; calls with an input that requires grad raise ValueError (`refuse_grad`).
    """
    forms = {"portable": forms["eager"], **forms}
    if impl is None:
        impl = default_impl(device) if "triton" in forms else "portable"
    if impl not in IMPLS:
        raise ImplError(f"impl {impl!r} of {op}: choose one of {', '.join(IMPLS)}")
    if impl not in forms:
        raise ImplError(f"impl {impl!r} of {op} does not exist; it has {', '.join(sorted(forms))}")
    if impl == "triton":
        check_triton(op, device)
    return spanned(op, without_grad(op, forms[impl]))


def without_grad(op: str, form: Callable) -> Callable:
    """`form` with `refuse_grad` of its arguments; `form` itself while no gradients are recorded."""
    if not torch.is_grad_enabled():
        return form

    @wraps(form)
    def checked(*arguments: Any, **options: Any) -> Any:
        refuse_grad(op, (*arguments, *options.values()))
        return form(*arguments, **options)

    return checked


def refuse_grad(op: str, arguments: Iterable[object]) -> None:
    """Raise ValueError if gradients are recorded and a tensor of `arguments` requires them.

    Ops have no backward: their results would silently be constants.
    """
    if not torch.is_grad_enabled():
        return
    for argument in arguments:
        if isinstance(argument, tuple | list):
            refuse_grad(op, argument)
        elif isinstance(argument, Tensor) and argument.requires_grad:
            raise ValueError(
                f"{op} has no backward, but an input {list(argument.shape)} requires grad: call it"
                " under torch.no_grad() or torch.inference_mode(), or detach the input"
            )


def operators() -> Any:
    """torch.ops.pacore, whose operators ops call while they are compiled or exported.

    Raises ImplError if the operators are not registered.
    """
    if not hasattr(torch.ops.pacore, "rms_norm"):
        raise ImplError("to compile or export ops, import kernels.torch_ops first")
    return torch.ops.pacore


def default_impl(device: torch.device) -> str:
    """The implementation that `impl=None` takes of an op with all forms."""
    return "triton" if runs_on_gpu(device) else "portable"


def runs_on_gpu(device: torch.device) -> bool:
    """Whether ops take their GPU forms: on CUDA, and while launches are recorded without a GPU."""
    return device.type == "cuda" or without_gpu.get()


def check_triton(op: str, device: torch.device) -> None:
    """Raise ImplError if Triton kernels cannot run on `device`."""
    if device.type != "cuda" and not (without_gpu.get() or _interpreting()):
        raise ImplError(f"impl 'triton' of {op} needs a CUDA device, not {device}")


def copyable(x: Tensor) -> bool:
    """Whether TMA can read a matrix: its start and its rows are aligned to 16 bytes."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def check(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def _interpreting() -> bool:
    """Whether Triton kernels run in Triton's CPU interpreter, as in tests."""
    import triton

    return triton.knobs.runtime.interpret
