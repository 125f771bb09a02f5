"""A minimal op of the benchmarks, without cases, peers or an fp64 formula."""

from collections.abc import Callable

from bench.errors import Error
from bench.suite.op import Op


def toy_op(name: str, run: Callable, **fields: object) -> Op:
    """`fields` replace the defaults."""
    defaults = {"rank": 0, "varies": "x", "cases": _none, "checks": _none, "formula": run}
    tolerances = {"tolerance_16": Error(2, 1), "tolerance_32": Error(2, 1)}
    return Op(name=name, run=run, **defaults | tolerances | fields)


def _none(*_: str) -> list:
    return []
