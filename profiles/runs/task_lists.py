"""The task lists of `record` and `first-light` for a device, in order of execution."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

import torch

from bench.measure.devices import DTYPES, MAIN_DTYPE, TIMED_DTYPES
from bench.measure.pairs import CHECKED_DTYPE, checks, pairs
from bench.studies import decode, images, linears
from bench.studies.host import launch_cost
from bench.suite import cases, numerics_cases
from bench.suite.forms import FORMS, forms_of
from bench.suite.op import Case
from kernels.runtime.dispatch import IMPLS
from kernels.runtime.dtypes import dtype_name
from model.config import PRESETS
from model.errors import InputError
from profiles.runs import pytest_tasks
from profiles.runs.task import Task

DECODE = {
    "cpu": ("tiny", [(1, 256, 64), (4, 256, 64)]),
    "cuda": ("step3-vl-10b", [(batch, 2048, 512) for batch in (16, 64, 1)]),
}
# (Rollouts, prompt, tokens per rollout), steps in a block, blocks: at most those of `bench engine`.
ENGINE = {
    "cpu": ("tiny", [(4, 256, 16)], 6, 2),
    "cuda": ("step3-vl-10b", [(batch, 2048, 128) for batch in (64, 16, 32)], 32, 3),
}
# Peers that come with PyTorch and compile nothing per case.
QUICK_PEERS = ("sdpa", "sdpa-flash", "sdpa-cudnn", "cudnn", "cudnn-folded")
LIBRARY_PEERS = ("sdpa-flash", "sdpa-cudnn", "cudnn-folded")  # for the first look at a GPU
FIRST_LIGHT_S = 0.3  # of timing per form
PAIR_S, LINEAR_S, LAUNCHES_S = 0.1, 0.1, 0.3  # the same, for what decisions depend on


def record(
    device: torch.device,
    forms: Sequence[str] = (),
    peers: bool = True,
    breakdown: bool = True,
    anyway: bool = False,
) -> list[Task]:
    """Everything that `device` can measure, the most worthwhile first.

    forms: measure only these forms (if empty: all of ours and QUICK_PEERS)
    Raises InputError for a form that does not exist.
    """
    _check_forms(forms, device.type)
    main = dtype_name(MAIN_DTYPE[device.type])
    wanted = tuple(forms)
    roofs = [
        Task("roofline", "roofline", "copy, matrix product", dtype_name(dtype))
        for dtype in TIMED_DTYPES[device.type]
    ]
    measured = (
        *_numerics(device.type, wanted),
        *_ops(device.type, wanted, peers, anyway),
        *_steps("decode", device.type, _selected(wanted, decode.forms_on(device.type)), breakdown),
        *_steps("engine", device.type, _engine_forms(device.type, wanted), breakdown),
        *_images(device.type, _selected(wanted, images.forms_on(device.type)), main),
    )
    compiling = _compile(device.type, 180)
    return [*compiling, *roofs, *(task for task in measured if task.forms)]


def first_light(device: torch.device, packed: bool = False) -> list[Task]:
    """The tasks of the first minutes on a GPU: first the numerics of every kernel, then the times
    of ours. Eager is the reference and is not timed: some of its steps take a second.

    packed: whether the kernels were unpacked, already compiled
    """
    on_gpu = device.type == "cuda"
    main = dtype_name(MAIN_DTYPE[device.type])
    numerics = _first_numerics(device.type)
    tests = [Task("tests", "test", name, limit_s=45) for name in pytest_tasks.collected()]
    roof = Task("roofline", "roofline", "copy, matrix product", main, limit_s=20)
    timed = []
    for case in _round_robin(cases(device.type)):
        names = ("triton", *case.modes, "portable", *LIBRARY_PEERS) if on_gpu else ("portable",)
        forms = forms_of(case, names)
        arguments = {"budget_s": FIRST_LIGHT_S * len(forms), "anyway": True}
        timed.append(Task("ops", case.op, case.name, main, forms, 30, arguments))
    default = [name for name in decode.forms_on(device.type) if name != "eager"]
    steps = _steps("decode", device.type, default, False, budget_s=1.0, limit_s=45)
    engine = [
        task
        for task in _steps("engine", device.type, ["default"], False, blocks=2, limit_s=45)
        if not on_gpu or task.arguments["sizes"][0] in (16, 64)
    ]
    tower = [
        task
        for task in _images(device.type, ("default",), main, budget_s=2.0, limit_s=40)
        if task.arguments["size"] == (1920, 1080)
    ]
    compiling = [] if packed else _compile(device.type, 60)
    for_decisions = _for_decisions(device.type, main)
    return [*numerics, *tests, *compiling, roof, *for_decisions, *timed, *steps, *engine, *tower]


TASK_LISTS: dict[str, Callable[..., list[Task]]] = {"record": record, "first-light": first_light}


def _compile(device_type: str, limit_s: float) -> list[Task]:
    """On a GPU: compile everything that is timed, so that no timing waits for the compiler."""
    return [Task("compile", "compile", "all kernels", limit_s=limit_s)] * (device_type == "cuda")


def _first_numerics(device_type: str) -> Iterator[Task]:
    """Every form of the numerics cases, then both forms of the cases that are timed in pairs."""
    for dtype in DTYPES:
        for case in numerics_cases():
            for form in ("triton", *case.modes) if device_type == "cuda" else ("portable",):
                yield Task("numerics", case.op, case.name, dtype_name(dtype), (form,), limit_s=20)
    for case, forms in checks(device_type):
        yield Task("numerics", case.op, case.name, dtype_name(CHECKED_DTYPE), forms, limit_s=20)


def _for_decisions(device_type: str, main: str) -> Iterator[Task]:
    """What first_light/decision_table.py reads apart from numerics: fifteen seconds on a GPU."""
    form = "triton" if device_type == "cuda" else "portable"
    arguments = {"budget_s": LAUNCHES_S}
    yield Task("launches", "launch", launch_cost.CASE, main, (form,), 20, arguments)
    for case, forms in pairs(device_type):
        arguments = {"budget_s": PAIR_S * len(forms)}
        yield Task("pairs", case.op, case.name, main, forms, 30, arguments)
    preset = DECODE[device_type][0]
    for rows in linears.ROWS:
        for name in linears.NAMES:
            product = {"preset": preset, "name": name, "rows": rows, "budget_s": LINEAR_S}
            text = linears.case_name(name, rows)
            yield Task("linears", "linear", text, main, ("torch",), 20, product)


def _numerics(device_type: str, wanted: tuple[str, ...]) -> Iterator[Task]:
    for dtype in DTYPES:
        for case in numerics_cases():
            forms = _selected(wanted, _ours(case, device_type))
            yield Task("numerics", case.op, case.name, dtype_name(dtype), forms, limit_s=60)


def _ops(device_type: str, wanted: tuple[str, ...], peers: bool, anyway: bool) -> Iterator[Task]:
    arguments = {"budget_s": 1.0, "anyway": anyway}
    for case in cases(device_type):
        quick = [name for name in case.peers if name in QUICK_PEERS] if peers else []
        forms = forms_of(case, wanted) if wanted else (*_ours(case, device_type), *quick)
        yield Task(
            "ops", case.op, case.name, dtype_name(MAIN_DTYPE[device_type]), forms, 90, arguments
        )


def _steps(
    section: str,
    device_type: str,
    forms: Sequence[str],
    breakdown: bool,
    *,
    budget_s: float = 3.0,
    blocks: int | None = None,
    limit_s: float = 180.0,
) -> Iterator[Task]:
    """Tasks of a whole model: its "decode" steps or its "engine" steps."""
    options: dict[str, Any]
    if section == "decode":
        preset, sizes = DECODE[device_type]
        options = {"breakdown": breakdown, "budget_s": budget_s}
    else:
        preset, sizes, steps, max_blocks = ENGINE[device_type]
        options = {"steps": steps, "blocks": blocks or max_blocks}
    main = dtype_name(MAIN_DTYPE[device_type])
    for size in sizes:
        arguments = {"preset": preset, "sizes": size, **options}
        case = f"{preset} {decode.DecodeCase(*size).name}"
        yield Task(section, f"{section}_step", case, main, tuple(forms), limit_s, arguments)


def _engine_forms(device_type: str, wanted: Sequence[str]) -> tuple[str, ...]:
    """The 10B's eager engine takes minutes: only on request; "decode" has its eager steps."""
    forms = decode.forms_on(device_type)
    return forms[1:] if device_type == "cuda" and not wanted else _selected(wanted, forms)


def _images(
    device_type: str,
    forms: Sequence[str],
    dtype: str,
    budget_s: float = 4.0,
    limit_s: float = 120.0,
) -> Iterator[Task]:
    config = PRESETS[images.MODELS[device_type]]
    for size in images.SIZES:
        case = images.case_name(config, size)
        arguments = {"preset": config.name, "size": size, "budget_s": budget_s}
        yield Task("vision", "vision", case, dtype, tuple(forms), limit_s, arguments)


def _ours(case: Case, device_type: str) -> tuple[str, ...]:
    return (*IMPLS, *case.modes) if device_type == "cuda" else IMPLS[:2]


def _selected(wanted: Sequence[str], forms: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in forms if not wanted or name in wanted)


def _check_forms(forms: Sequence[str], device_type: str) -> None:
    known = dict.fromkeys((*FORMS, *decode.forms_on(device_type), *images.forms_on(device_type)))
    for name in forms:
        if name not in known:
            raise InputError(f"unknown form {name!r}; choose from: {', '.join(known)}")


def _round_robin(all_cases: Sequence[Case]) -> list[Case]:
    """The first case of every op, then the second of each, and so on."""
    by_op: dict[str, list[Case]] = {}
    for case in all_cases:
        by_op.setdefault(case.op, []).append(case)
    return [case for row in zip_longest(*by_op.values()) for case in row if case]
