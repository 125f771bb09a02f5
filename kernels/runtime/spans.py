"""Named ranges of the work for profilers: off (the default), NVTX's or PyTorch's.

    with span("engine step"): ...              a range of this thread
    spanned("linear qkv", F.linear)(x, w)      a call in a range; the bare function while off
    end = begin("round", 0); ...; end()        a range that others overlap, ended later
    with use("torch"): ...                     switches all of them on, in all threads

PACORE_SPANS=nvtx or torch in the environment switches them on from the start. Ranges name what the
host does: of kernels that a CUDA graph replays they see the replay alone. Under capture they are as
harmless as elsewhere, since they never touch the device.

Ranges are PaCoRe's rounds, the engine's steps ("engine step 7": "schedule", "execute", "update"),
layers ("decoder layer 3"), every op by its name (`dispatch.pick`; `rotary_attention` where it is
fused) and every matrix product of the model ("linear gate_up"). What stands before the first
number is their `family`. The time of each less that of the ranges in it makes up a step.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial, wraps
from typing import NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

MODES = ("off", "nvtx", "torch")
VARIABLE = "PACORE_SPANS"
DOMAIN = "pacore"  # NVTX's


class Ranges(NamedTuple):
    """How a mode makes ranges by name: as a context, and begun, to be ended by a call."""

    span: Callable[[str], AbstractContextManager]
    begin: Callable[[str], Callable[[], object]]


_NOTHING = nullcontext()


def span(name: str, which: object = None) -> AbstractContextManager:
    """A range of this thread, called `name` or "name which", for a `with` statement."""
    if _ranges is None:
        return _NOTHING
    return _ranges.span(_full(name, which))


def spanned(name: str, function: Callable[P, T]) -> Callable[P, T]:
    """`function` in a range of this name; `function` itself while spans are off."""
    if _ranges is None:
        return function

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with span(name):
            return function(*args, **kwargs)

    return call


def begin(name: str, which: object = None) -> Callable[[], object]:
    """Open a range that need not nest in others, and give what ends it, once."""
    if _ranges is None:
        return _end_nothing
    return _ranges.begin(_full(name, which))


@contextmanager
def use(mode: "str | Ranges") -> Iterator[None]:
    """Within the block spans are in `mode`, one of MODES or ranges of one's own, in all threads.

    Raises ValueError for another mode, ModuleNotFoundError where "nvtx" lacks its library.
    """
    global _ranges
    before, _ranges = _ranges, mode if isinstance(mode, Ranges) else _made(mode)
    try:
        yield
    finally:
        _ranges = before


def family(name: str) -> str:
    """What spans of many numbers share: "decoder layer" of "decoder layer 3"."""
    return re.split(r" (?=\d)", name, maxsplit=1)[0]


def _full(name: str, which: object) -> str:
    return name if which is None else f"{name} {which}"


def _end_nothing() -> None:
    pass


@cache
def _made(mode: str) -> Ranges | None:
    if mode not in MODES:
        raise ValueError(f"spans {mode!r}: choose one of {', '.join(MODES)}")
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


_ranges: Ranges | None = _made(os.environ.get(VARIABLE) or "off")
