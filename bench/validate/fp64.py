"""The expected results of a case, by the fp64 formulas of the ops."""

import torch
from torch import Tensor

from bench.suite import OPS
from bench.suite.op import Case
from kernels.kv_pages import KVPages


def reference(case: Case, inputs: dict) -> list[Tensor]:
    """The expected results of the case's op, then the pages it should have written.

    In fp64, tokens in int64, on the CPU. `inputs` are not modified.
    """
    wide = {name: _wide(value) for name, value in inputs.items()}
    with torch.inference_mode():
        return list(OPS[case.op].formula(**wide))


def _wide(value: object) -> object:
    def widened(x: Tensor) -> Tensor:
        return x.to("cpu", torch.float64 if x.is_floating_point() else None, copy=True)

    if isinstance(value, KVPages):
        return value.map(widened)
    return widened(value) if isinstance(value, Tensor) else value
