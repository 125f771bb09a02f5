"""Spans, named ranges of host work for profilers: off (the default), NVTX's or PyTorch's.

    with span("engine step"): ...              a span of this thread
    spanned("linear qkv", F.linear)(x, w)      a call in a span; the bare function while off
    end = begin("round", 0); ...; end()        a span that may overlap others, ended later
    with use("torch"): ...                     switches all spans on, in all threads

PACORE_SPANS=nvtx or torch in the environment switches them on from the start. Spans cover what the
host does: for kernels in a CUDA graph they show only the replay. They never touch the device, so
they are safe during capture.

There are spans for PaCoRe's rounds, the engine's steps ("engine step 7": "schedule", "execute",
"update"), layers ("decoder layer 3"), every op by its name (`dispatch.pick`; `rotary_attention`
where it is fused) and every matrix product of the model ("linear gate_up"). A span's name up to the
first number is its `family`. The self times of all spans (each without the spans inside it) add up
to the step.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial, wraps
from typing import NamedTuple, ParamSpec, TypeVar

from kernels.errors import VariableError
from kernels.runtime.environment import VARIABLES, variable

P = ParamSpec("P")
T = TypeVar("T")

VARIABLE = "PACORE_SPANS"
MODES = VARIABLES[VARIABLE]
DOMAIN = "pacore"  # NVTX's


class Ranges(NamedTuple):
    """A mode's two ways to open a range by name."""

    span: Callable[[str], AbstractContextManager]
    begin: Callable[[str], Callable[[], object]]  # returns the call that ends it


_NOTHING = nullcontext()


def span(name: str, which: object = None) -> AbstractContextManager:
    """A context manager: a span of this thread named `name` or "name which"."""
    if _ranges is None:
        return _NOTHING
    return _ranges.span(_full(name, which))


def spanned(name: str, function: Callable[P, T]) -> Callable[P, T]:
    """`function` wrapped in a span of this name; `function` itself while spans are off."""
    if _ranges is None:
        return function

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with span(name):
            return function(*args, **kwargs)

    return call


def begin(name: str, which: object = None) -> Callable[[], object]:
    """Open a span that need not nest in others; returns the call that ends it, to be made once."""
    if _ranges is None:
        return _end_nothing
    return _ranges.begin(_full(name, which))


@contextmanager
def use(mode: "str | Ranges") -> Iterator[None]:
    """Set the mode of spans inside the block, in all threads: one of MODES, or a `Ranges`.

    Raises ValueError for another mode, ModuleNotFoundError for "nvtx" without its library.
    """
    global _ranges
    before, _ranges = _ranges, mode if isinstance(mode, Ranges) else _ranges_of(mode)
    try:
        yield
    finally:
        _ranges = before


def family(name: str) -> str:
    """A span's name without its numbers: "decoder layer" for "decoder layer 3"."""
    return re.split(r" (?=\d)", name, maxsplit=1)[0]


def _full(name: str, which: object) -> str:
    return name if which is None else f"{name} {which}"


def _end_nothing() -> None:
    pass


@cache
def _ranges_of(mode: str) -> Ranges | None:
    if mode not in MODES:
        raise ValueError(f"spans ({VARIABLE}) must be one of {', '.join(MODES)}, not {mode!r}")
    return {"off": lambda: None, "nvtx": _nvtx, "torch": _torch}[mode]()


def _nvtx() -> Ranges:
    import nvtx  # optional

    def begin(name: str) -> Callable[[], object]:
        return partial(nvtx.end_range, nvtx.start_range(name, domain=DOMAIN))

    return Ranges(partial(nvtx.annotate, domain=DOMAIN), begin)


def _torch() -> Ranges:
    from torch.profiler import record_function  # users of this module may do without torch

    def begin(name: str) -> Callable[[], object]:
        opened = record_function(name)
        opened.__enter__()
        return partial(opened.__exit__, None, None, None)

    return Ranges(record_function, begin)


def _ranges_of_environment() -> Ranges | None:
    try:
        return _ranges_of(variable(VARIABLE))
    except ModuleNotFoundError as error:
        raise VariableError(f"{VARIABLE}=nvtx needs the package {error.name}") from None


_ranges: Ranges | None = _ranges_of_environment()
