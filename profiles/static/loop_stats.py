"""What a kernel's hot loops copy ahead and what a trip costs: each figure a list, loop by loop.

TTGIR and SASS each give their loops in the order of the text (`sass_loop.hot_loops`). None stands
for what is not known or has no meaning there: an `async_wait` where nothing is copied that way, a
figure of a kernel without loops.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

from kernels.runtime.configs import A100, H200
from pacore_sched.sim.machine import COPY_SHARE, MACHINES
from profiles.static.pipeline import Pipeline
from profiles.static.sass_loop import SassSummary

Figure = list[int | None] | None
# The worse of two, which is also where the baseline lets no figure of GUARDED go.
WORST: dict[str, Callable] = {
    "buffers": min,  # of the operand with fewest; 0: nothing is copied ahead
    "async_wait": min,  # 0: a copy is awaited as soon as it is issued
    "bytes_in_flight": min,  # of an SM's programs while they compute
    "barriers": max,
    "instructions_per_block": max,  # of a trip
    "f2f": max,  # conversions on a slow pipe; packed ones (F2FP) are not
    "narrow_shared_loads": max,  # of 1 or 2 bytes
    "wgmma_waits": max,  # until no product is left
}
SASS = {  # of these, what SASS counts
    "barriers": "barrier",
    "f2f": "F2F",
    "narrow_shared_loads": "shared load 1, 2",
    "wgmma_waits": "wgmma wait",
}
GUARDED = ("async_wait", "buffers", "barriers", "instructions_per_block", "f2f", "wgmma_waits")
# With the same Triton only the kernel's source moves instructions: address arithmetic that is
# written differently by a few in hundreds, the predicates of one more copy by 8 %, masks by 35 %.
INSTRUCTIONS_SLACK = 0.05

# Little's law: an SM's share of the bandwidth times the latency is what it must have on its way.
# The least is for a copy's bandwidth and the shorter latency, the most for the data sheet's and the
# longer. Latency of loaded HBM, in seconds: assumed, until it is measured.
LATENCY = 0.8e-6, 1.0e-6
SMS = {80: {"a100": A100.sms}, 90: {"h100": 132, "h200": H200.sms}}  # by architecture


def bytes_to_cover(arch: int) -> dict[str, tuple[int, int]]:
    """Least and most bytes that an SM must have on their way, for each GPU of `arch`."""
    found = {}
    for name, sms in SMS[arch].items():
        share = MACHINES[name].copy_gb_s * 1e9 / sms
        found[name] = round(share * LATENCY[0]), round(share / COPY_SHARE * LATENCY[1])
    return found


def loop_stats(
    pipelines: Sequence[Pipeline], found: SassSummary, programs_per_sm: int
) -> dict[str, Figure]:
    """The figures of WORST of one kernel."""
    ahead = [pipeline.bytes_ahead for pipeline in pipelines]
    figures: dict[str, list] = {
        "buffers": [
            None if pipeline.buffers is None else min(pipeline.buffers, default=0)
            for pipeline in pipelines
        ],
        "async_wait": [pipeline.async_wait for pipeline in pipelines],
        "bytes_in_flight": [None if size is None else size * programs_per_sm for size in ahead],
        "instructions_per_block": [sum(mix.values()) for mix in found.loops],
    }
    for name, kind in SASS.items():
        figures[name] = [mix.get(kind, 0) for mix in found.loops]
    return {name: figures[name] or None for name in WORST}


def remarks(pipelines: Sequence[Pipeline], found: SassSummary) -> list[str]:
    """What is amiss in the loops' pipelines, and in which (from 1, in the order of the text)."""
    mixes = found.loops if len(found.loops) == len(pipelines) else [{}] * len(pipelines)
    loops = defaultdict(list)
    for at, (pipeline, mix) in enumerate(zip(pipelines, mixes, strict=True), 1):
        amiss = {
            "copies awaited as soon as they are issued": pipeline.async_wait == 0,
            "a scalar takes a stage of the pipeline": pipeline.scalar_copies > 0,
            "copies of 4 bytes": mix.get("copy 4", 0) > pipeline.scalar_copies,
            "scalar loads": pipeline.buffers and pipeline.scalar_loads,
        }
        for text in filter(amiss.get, amiss):
            loops[text].append(at)
    return [f"{text} in loop {', '.join(map(str, where))}" for text, where in loops.items()]


def worse(name: str, one: Figure, other: Figure) -> Figure:
    """Loop by loop the worse of two launches' figures."""
    if one is None or other is None:
        return one or other
    return [_worst(name, pair) for pair in zip_longest(one, other)]


def worsened(row: dict, known: dict) -> Iterator[str]:
    """The guarded figures of `row` that are worse than those `known`, before and after."""
    for name in GUARDED:
        before, now = known.get(name), row[name]
        if before is not None and _worsened(name, before, now):
            yield f"{name} {_text(before)} -> {_text(now)}"


def _worsened(name: str, before: Sequence, now: Figure) -> bool:
    now = now or [None]
    if len(before) != len(now):  # other loops than before: hold the worst against the worst
        before, now = ([_worst(name, figure)] for figure in (before, now))
    return any(_is_worse(name, *pair) for pair in zip(before, now, strict=True))


def _is_worse(name: str, before: int | None, now: int | None) -> bool:
    if before is None:
        return False
    if WORST[name] is min:
        return now is None or now < before
    slack = INSTRUCTIONS_SLACK if name == "instructions_per_block" else 0
    return now is not None and now > before * (1 + slack)


def _worst(name: str, figure: Sequence) -> int | None:
    return WORST[name]((value for value in figure if value is not None), default=None)


def _text(figure: Figure) -> str:
    return "none" if figure is None else ", ".join(map(str, figure))
