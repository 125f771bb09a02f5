"""What every op's launcher shares: the choice of implementation and the checks on its arguments."""

from collections.abc import Callable

import torch

IMPLS = ("eager", "portable", "triton")


def pick(op: str, impl: str | None, device: torch.device, forms: dict[str, Callable]) -> Callable:
    """The form of `op` to run on `device`.

    `forms` maps names from IMPLS to callables and always holds "eager", the definition.
    `impl=None` takes Triton on CUDA and the portable form elsewhere, as far as the op has them; a
    named form never falls back to another. Raises ValueError if the named form does not exist or
    cannot run on `device`.
    """
    if impl is None:
        order = ("triton", "portable", "eager") if device.type == "cuda" else ("portable", "eager")
        return next(forms[name] for name in order if name in forms)
    if impl not in IMPLS:
        raise ValueError(f"impl {impl!r} of {op}: choose one of {', '.join(IMPLS)}")
    if impl not in forms:
        raise ValueError(f"impl {impl!r} of {op} does not exist; it has {', '.join(forms)}")
    if impl == "triton" and device.type != "cuda" and not _interpreting():
        raise ValueError(f"impl 'triton' of {op} needs a CUDA device, not {device}")
    return forms[impl]


def check(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def _interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter, as tests do."""
    import triton

    return triton.knobs.runtime.interpret
