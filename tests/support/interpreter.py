"""Corrections of Triton's CPU interpreter for tests: bf16 arithmetic, and loops with every NumPy.

The interpreter stores bf16 as its bits in uint16, and computes with those as if they were integers.
After `correct_interpreter`, an operation on bf16 moves bits, or is computed in fp32 and rounded to
nearest even, or raises NotImplementedError: no result is silently wrong. fp32 is wide enough for
that to be the correctly rounded sum, difference or product of two bf16. No kernel here needs the
refused operations; Triton converts the operands of most of them to fp32 first.

Tested with the interpreters of Triton 3.6.0, 3.7.1, 3.8.0 and 3.9.0. An operation that a later
version adds is refused for bf16 until it is listed here.
"""

from collections.abc import Callable

import numpy as np
from numpy import ndarray
from triton import language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

Method = Callable[..., object]  # a method of InterpreterBuilder

# Methods of InterpreterBuilder, without "create_", that only move the bits of bf16.
LOADS_AND_STORES = {"load", "store", "masked_load", "masked_store", "atomic_load", "atomic_store"}
POINTERS = {"addptr", "make_block_ptr", "advance", "tensor_pointer_store", "int_to_ptr"}
DESCRIPTORS = {
    "make_tensor_descriptor",
    "descriptor_store",
    "descriptor_gather",  # calls descriptor_load
    "descriptor_scatter",
}
SHAPES = {"reshape", "trans", "expand_dims", "broadcast", "cat", "join", "split", "splat"}
BITS = {"bitcast", "select", "fabs", "gather", "unsplat"}
MOVES = LOADS_AND_STORES | POINTERS | DESCRIPTORS | SHAPES | BITS


def correct_interpreter() -> None:
    """Replace Triton's operations with corrected ones, for the rest of the process."""
    for name, plain in list(vars(InterpreterBuilder).items()):
        op = name.removeprefix("create_")
        if (op != name and op not in MOVES) or name == "get_all_ones_value":
            setattr(InterpreterBuilder, name, CORRECTED.get(op, _refused)(op, plain))
        if op.startswith(("icmp", "fcmp")):
            setattr(InterpreterBuilder, name, _truths(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.get_bf16 = _get_bf16  # missing before Triton 3.9
    _correct_reductions()
    _correct_python_values()


def to_fp32(bits: ndarray) -> ndarray:
    """The exact fp32 values of bf16 bits, uint16 of any shape."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(values: ndarray) -> ndarray:
    """fp32 of any shape rounded to nearest even, as bf16 bits in uint16. NaN stays NaN."""
    bits = np.asarray(values).view(np.uint32)
    with np.errstate(over="ignore"):  # for NaN, whose rounded value is not used
        rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    quiet = bits | np.uint32(1 << 22)
    return (np.where(np.isnan(values), quiet, rounded) >> np.uint32(16)).astype(np.uint16)


def _refused(op: str, plain: Method) -> Method:
    def run(self: InterpreterBuilder, *args: object, **options: object) -> object:
        if any(map(_is_bf16, (*args, *options.values()))):
            raise _refusal(op)
        return plain(self, *args, **options)

    return run


def _rounded(op: str, plain: Method) -> Method:
    def run(self: InterpreterBuilder, *operands: TensorHandle) -> object:
        if not _all_bf16(op, operands):
            return plain(self, *operands)
        return _narrow(plain(self, *map(_wide, operands)))

    return run


def _compared(op: str, plain: Method) -> Method:
    def run(self: InterpreterBuilder, *operands: TensorHandle) -> object:
        if not _all_bf16(op, operands):
            return plain(self, *operands)
        return plain(self, *map(_wide, operands))

    return run


def _truths(compare: Method) -> Method:
    """A comparison with results of type int1. Triton's have the type of the operands, so a scalar
    result becomes a block of integers, which 3.9 does not accept as a mask."""

    def run(self: InterpreterBuilder, *operands: TensorHandle) -> TensorHandle:
        return TensorHandle(compare(self, *operands).data, tl.int1)

    return run


def _multiplied(op: str, plain: Method) -> Method:
    """tl.dot: products of bf16 are exact in fp32, and are summed in fp32."""

    def run(self: InterpreterBuilder, a: object, b: object, acc: object, *rest: object) -> object:
        if _is_bf16(acc):
            raise _refusal("dot into an accumulator")
        if _all_bf16(op, (a, b)):
            a, b = _wide(a), _wide(b)
        return plain(self, a, b, acc, *rest)

    return run


def _converted(op: str, plain: Method) -> Method:
    """Conversions from bf16 to fp16 and fp32, and to bf16 from these and, through fp32 as on a GPU,
    from integers."""

    def run(self: InterpreterBuilder, src: object, dst_type: tl.dtype, *rounding: object) -> object:
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (source, target):
            return plain(self, src, dst_type, *rounding)
        if set(rounding) - {None, ir.ROUNDING_MODE.RTNE}:
            raise _refusal(f"{op} {rounding[0]}")
        if source == tl.bfloat16 and target in (tl.float16, tl.float32):
            return self.cast_impl(_wide(src), dst_type)
        if target == tl.bfloat16 and (source.is_int() or source in (tl.float16, tl.float32)):
            return _narrow(self.cast_impl(src, tl.float32))
        raise _refusal(f"{op} from {source} to {target}")

    return run


def _padded(op: str, plain: Method) -> Method:
    """A load through a block pointer or descriptor, whose padding with NaN would be 0 in uint16."""

    def run(self: InterpreterBuilder, source: object, *rest: object) -> object:
        padding = (getattr(source, "padding", None), *rest)
        if source.base.get_element_ty() == tl.bfloat16 and ir.PADDING_OPTION.PAD_NAN in padding:
            raise _refusal(f"{op} padded with NaN")
        return plain(self, source, *rest)

    return run


# Wrappers of the other methods of Triton; methods that are not listed refuse bf16.
CORRECTED: dict[str, Callable[[str, Method], Method]] = {
    **dict.fromkeys(("fadd", "fsub", "fmul", "fneg"), _rounded),
    # NumPy's comparisons treat NaN as these ordered ones do (false), and as UNE does (true).
    **dict.fromkeys(("fcmpOLT", "fcmpOLE", "fcmpOGT", "fcmpOGE"), _compared),
    **dict.fromkeys(("fcmpOEQ", "fcmpUNE"), _compared),
    **dict.fromkeys(("si_to_fp", "ui_to_fp", "fp_ext", "fp_trunc", "fp_to_fp"), _converted),
    **dict.fromkeys(("tensor_pointer_load", "descriptor_load"), _padded),
    "dot": _multiplied,
}


def _get_bf16(self: InterpreterBuilder, value: float) -> TensorHandle:
    return self.create_fp_trunc(self.get_fp32(value), tl.bfloat16)


def _correct_reductions() -> None:
    plain = ReduceScanOpInterface.apply

    def apply(self: ReduceScanOpInterface, input: object) -> object:
        if _is_bf16(input):
            raise _refusal(type(self).__name__)
        return plain(self, input)

    ReduceScanOpInterface.apply = apply


def _correct_python_values() -> None:
    """Correct tensors as Python values. As an index, such as a loop's bound: Triton 3.6 calls int()
    on an array, which NumPy >= 2.4 refuses. As a condition: the bits of -0 in bf16 are not 0."""
    plain = interpreter._patch_lang_tensor

    def patch(tensor: type, scope: object) -> None:
        plain(tensor, scope)
        truth = tensor.__bool__

        def condition(self: tl.tensor) -> bool:
            if _is_bf16(self) and self.handle.data.size == 1:
                return bool(to_fp32(self.handle.data).item())
            return truth(self)

        scope.set_attr(tensor, "__bool__", condition)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


def _is_bf16(value: object) -> bool:
    """Whether a tensor, handle or type, or any in a list of them, is bf16. A pointer to bf16 is
    not."""
    if isinstance(value, list | tuple):
        return any(map(_is_bf16, value))
    dtype = value if isinstance(value, tl.dtype) else getattr(value, "dtype", None)
    return isinstance(dtype, tl.dtype) and dtype.scalar == tl.bfloat16


def _all_bf16(op: str, operands: tuple) -> bool:
    """Whether all operands are bf16; raises NotImplementedError if only some are."""
    kinds = set(map(_is_bf16, operands))
    if len(kinds) > 1:
        raise _refusal(f"{op} with another type and")
    return kinds == {True}


def _wide(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(to_fp32(handle.data), tl.float32)


def _narrow(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(to_bf16(handle.data), tl.bfloat16)


def _refusal(op: str) -> NotImplementedError:
    return NotImplementedError(f"{op} of bf16 would be wrong in Triton's interpreter")
