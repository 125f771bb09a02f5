"""Names of a model's ops, of their implementations (`impl`), and of its dtypes."""

from kernels.errors import ImplError
from kernels.runtime import dtypes
from kernels.runtime.dispatch import IMPLS
from kernels.runtime.dtypes import dtype_name

OPS = (
    "rms_norm",
    "layer_norm",
    "silu_mul",
    "qk_norm_rope",
    "prefix_attention",
    "patchify",
    "vision_attention",
    "linear_quick_gelu",
    "projector",
    "sample",
)

# Whose implementation a model chooses: "linear" is no op of kernels/, see `modules.Linear`.
CHOICES = ("linear", *OPS)

DTYPES = {dtype_name(dtype): dtype for dtype in dtypes.DTYPES}

Impl = str | dict[str, str] | None


def impl_per_op(impl: Impl) -> dict[str, str | None]:
    """`impl` as a dict with every choice; None means the best implementation for the device.

    Raises ImplError for an unknown op or implementation.
    """
    per_op: dict[str, str | None] = dict.fromkeys(CHOICES)
    per_op |= impl if isinstance(impl, dict) else dict.fromkeys(CHOICES, impl)
    for op, name in per_op.items():
        if op not in CHOICES:
            raise ImplError(f"unknown op {op!r}; the model's ops are {', '.join(CHOICES)}")
        if name is not None and name not in IMPLS:
            raise ImplError(f"unknown impl {name!r} of {op}; choose one of {', '.join(IMPLS)}")
    return per_op
