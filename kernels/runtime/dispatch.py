"""What every op's launcher shares: the choice of implementation and the checks on its arguments."""

from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch import Tensor

from kernels.errors import ImplError
from kernels.runtime.spans import spanned

IMPLS = ("eager", "portable", "triton")


# Set by kernels/compile/launches.py, which records the launches of Triton kernels instead of making
# them.
without_gpu: ContextVar[bool] = ContextVar("without_gpu", default=False)


def pick(op: str, impl: str | None, device: torch.device, forms: dict[str, Callable]) -> Callable:
    """The form of `op` to run on `device`.

    `forms` maps names from IMPLS to callables and always holds "eager", the definition.
    "portable" is the fastest PyTorch form, which may be the definition itself. `impl=None` takes
    Triton on CUDA where the op has it and portable otherwise; a named form never falls back to
    another. While spans are on its calls are ranges of the name `op`. Raises ImplError if the named
    form does not exist or cannot run on `device`.
    """
    forms = {"portable": forms["eager"], **forms}
    if impl is None:
        impl = "triton" if runs_on_gpu(device) and "triton" in forms else "portable"
    if impl not in IMPLS:
        raise ImplError(f"impl {impl!r} of {op}: choose one of {', '.join(IMPLS)}")
    if impl not in forms:
        raise ImplError(f"impl {impl!r} of {op} does not exist; it has {', '.join(sorted(forms))}")
    if impl == "triton":
        check_triton(op, device)
    return spanned(op, forms[impl])


def runs_on_gpu(device: torch.device) -> bool:
    """Whether ops take the forms of a GPU: on one, and where launches are recorded without one."""
    return device.type == "cuda" or without_gpu.get()


def check_triton(op: str, device: torch.device) -> None:
    """Raise ImplError if Triton kernels cannot run on `device`."""
    if device.type != "cuda" and not (without_gpu.get() or _interpreting()):
        raise ImplError(f"impl 'triton' of {op} needs a CUDA device, not {device}")


def copyable(x: Tensor) -> bool:
    """Whether tensor copies can read a matrix: rows and their beginning stand on 16 bytes."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def check(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def _interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter, as tests do."""
    import triton

    return triton.knobs.runtime.interpret
