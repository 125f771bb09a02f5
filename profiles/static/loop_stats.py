"""Figures of a kernel's hot loops: how far they copy ahead and what an iteration costs.

Each figure is a list with one value per loop, in the order of the code, in which TTGIR and SASS
both give their loops (`sass_loop.hot_loops`). None means unknown or not applicable: an `async_wait`
where nothing is copied asynchronously, a figure of a kernel without loops.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

from kernels.runtime.configs import A100, H200
from pacore_sched.sim.machine import COPY_SHARE, MACHINES
from profiles.static.pipeline import Pipeline
from profiles.static.sass_loop import SassSummary

Figure = list[int | None] | None
# The worse of two values; figures of GUARDED must not become worse than in the baseline.
WORST: dict[str, Callable] = {
    "buffers": min,  # of the operand with the fewest; 0: nothing is copied ahead
    "async_wait": min,  # 0: a copy is awaited as soon as it is issued
    "bytes_in_flight": min,  # of all programs of an SM, while they compute
    "barriers": max,
    "instructions_per_block": max,  # of one iteration
    "f2f": max,  # conversions on a slow pipe; packed conversions (F2FP) are not
    "narrow_shared_loads": max,  # of 1 or 2 bytes
    "wgmma_waits": max,  # until all products have ended
}
SASS = {  # the figures that are counts of SASS instructions
    "barriers": "barrier",
    "f2f": "F2F",
    "narrow_shared_loads": "shared load 1, 2",
    "wgmma_waits": "wgmma wait",
}
GUARDED = ("async_wait", "buffers", "barriers", "instructions_per_block", "f2f", "wgmma_waits")
# With the same Triton, only the kernel's source changes the number of instructions: rewritten
# address arithmetic by a few in hundreds, the predicates of one more copy by 8 %, masks by 35 %.
INSTRUCTIONS_SLACK = 0.05

# Little's law: an SM must have (its share of the bandwidth) x latency bytes in flight. The lower
# bound uses copy bandwidth and the shorter latency, the upper the data sheet's bandwidth and the
# longer. Latency of HBM under load, in seconds: assumed until measured.
LATENCY = 0.8e-6, 1.0e-6
SMS = {80: {"a100": A100.sms}, 90: {"h100": 132, "h200": H200.sms}}  # by architecture


def bytes_to_cover(arch: int) -> dict[str, tuple[int, int]]:
    """Lower and upper bound of the bytes that an SM must have in flight, for each GPU of `arch`."""
    bounds = {}
    for name, sms in SMS[arch].items():
        share = MACHINES[name].copy_gb_s * 1e9 / sms
        bounds[name] = round(share * LATENCY[0]), round(share / COPY_SHARE * LATENCY[1])
    return bounds


def loop_stats(
    pipelines: Sequence[Pipeline], summary: SassSummary, programs_per_sm: int
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
        "instructions_per_block": [sum(mix.values()) for mix in summary.loops],
    }
    for name, kind in SASS.items():
        figures[name] = [mix.get(kind, 0) for mix in summary.loops]
    return {name: figures[name] or None for name in WORST}


def remarks(pipelines: Sequence[Pipeline], summary: SassSummary) -> list[str]:
    """Problems of the loops' pipelines, and in which loops (from 1, in the order of the code)."""
    mixes = summary.loops if len(summary.loops) == len(pipelines) else [{}] * len(pipelines)
    loops = defaultdict(list)
    for number, (pipeline, mix) in enumerate(zip(pipelines, mixes, strict=True), 1):
        problems = {
            "copies awaited as soon as they are issued": pipeline.async_wait == 0,
            "a scalar takes a stage of the pipeline": pipeline.scalar_copies > 0,
            "copies of 4 bytes": mix.get("copy 4", 0) > pipeline.scalar_copies,
            "scalar loads": pipeline.buffers and pipeline.scalar_loads,
        }
        for text in filter(problems.get, problems):
            loops[text].append(number)
    return [f"{text} in loop {', '.join(map(str, where))}" for text, where in loops.items()]


def worse(name: str, a: Figure, b: Figure) -> Figure:
    """The worse of two launches' figures, for each loop."""
    if a is None or b is None:
        return a or b
    return [_worst(name, pair) for pair in zip_longest(a, b)]


def worsened(row: dict, known: dict) -> Iterator[str]:
    """The guarded figures of `row` that are worse than in `known`, as "name before -> after"."""
    for name in GUARDED:
        before, now = known.get(name), row[name]
        if before is not None and _worsened(name, before, now):
            yield f"{name} {_text(before)} -> {_text(now)}"


def _worsened(name: str, before: Sequence, now: Figure) -> bool:
    now = now or [None]
    if len(before) != len(now):  # other loops than before: compare the worst
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
