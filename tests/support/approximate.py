"""Triton's interpreter with the largest errors of a GPU's approximate instructions."""

import numpy as np
import pytest
from numpy import ndarray
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.kernels.runtime.ptx_errors import DIV_ULP, EX2_ULP, RSQRT

LOG2E = np.float32(1.4426950408889634)
SIDES = {"random": (0, 0), "both up": (1, 1), "apart": (1, -1)}  # for functions, for quotients


def approximate(monkeypatch: pytest.MonkeyPatch, sides: tuple[int, int]) -> None:
    """Give every exp, exp2, rsqrt and quotient in fp32 its documented error, towards its side:
    1 is up, -1 is down, 0 is random within the bound.
    """
    random = np.random.default_rng(0)

    def off(exact: ndarray, bound: ndarray, side: int) -> ndarray:
        """The fp32 number within the bound that is farthest from `exact`, which is fp64."""
        ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
        towards = np.asarray(side or random.uniform(-1, 1, exact.shape))
        steps = (exact + towards * bound * ulp) / ulp
        wrong = np.where(towards > 0, np.floor(steps), np.ceil(steps)) * ulp
        kept = (exact == 0) | ~np.isfinite(ulp)
        return np.where(kept, exact, wrong).astype(np.float32)

    def ex2(x: ndarray) -> ndarray:  # 1 at 0, as documented
        return np.where(x == 0, x + 1, off(np.exp2(x.astype(np.float64)), EX2_ULP, sides[0]))

    def rsqrt(x: ndarray) -> ndarray:
        exact = 1 / np.sqrt(x.astype(np.float64))
        roundoffs = exact * 2.0**-24 / np.spacing(exact.astype(np.float32))
        return off(exact, RSQRT * roundoffs, sides[0])

    def div(x: ndarray, y: ndarray) -> ndarray:
        return off(x.astype(np.float64) / y, DIV_ULP, sides[1])

    functions = {"exp": lambda x: ex2(x * LOG2E), "exp2": ex2, "rsqrt": rsqrt, "fdiv": div}
    for name, function in functions.items():
        exact = getattr(InterpreterBuilder, f"create_{name}")

        def run(self, *args, exact=exact, function=function):
            if args[0].data.dtype != np.float32:
                return exact(self, *args)
            return TensorHandle(function(*(x.data for x in args)), args[0].dtype)

        monkeypatch.setattr(InterpreterBuilder, f"create_{name}", run)
