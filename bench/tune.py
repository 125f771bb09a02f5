"""Tile choices by measurement: for every tile key of an op the candidates that its module offers,
checked, timed beside each other in one run, and the best written to the GPU's table.

A key may stand for several cases: the best candidate is right on all of them and has the smallest
geometric mean of its times.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import triton

from bench import jsonl, rows, show
from bench.cases import Case, in_modes
from bench.numerics import Verdict, form, judge, reference
from bench.poison import check_poison
from bench.timing import Timing, measure, sets_for
from kernels.compile.launches import launches_recorded
from kernels.compile.unfilled import unfilled
from kernels.errors import ImplError, one_line
from kernels.runtime import configs
from kernels.runtime.configs import TUNABLES, Gpu, KernelConfig, record_configs, use_config
from model.errors import InputError

BUDGET_S = 0.2  # of timing, for each candidate on each case
Key = tuple[str, str]  # what asks for tiles, an op or a part of one, and the class of its inputs


@dataclass(frozen=True)
class TuningSet:
    """What there is to measure for one key: the cases that fall into it and the tiles to try."""

    key: Key
    cases: list[Case]
    candidates: list[KernelConfig]  # what is chosen now comes first


def tuning_sets(cases: Sequence[Case], dtype: torch.dtype, gpu: Gpu) -> list[TuningSet]:
    """The keys that `cases` fall into on `gpu`, with their candidates. Nothing runs on a device.

    Ops without a Triton form have no keys.
    """
    found: dict[Key, tuple[list[Case], KernelConfig]] = {}
    for case in in_modes(cases):
        try:
            asked = requested_configs(case, dtype, gpu)
        except ImplError:
            continue
        for key, chosen in asked.items():
            found.setdefault(key, ([], chosen))[0].append(case)
    return [
        TuningSet(key, of_key, _unique([chosen, *TUNABLES[key[0]].candidates(key[1], gpu)]))
        for key, (of_key, chosen) in found.items()
    ]


def check_compiles() -> None:
    """Raise InputError where Triton interprets: launches would run instead of being recorded."""
    if triton.knobs.runtime.interpret:
        raise InputError("TRITON_INTERPRET is set: unset it, Triton would not compile here")


def tune(plan: TuningSet, device: torch.device, dtype: torch.dtype) -> list[dict]:
    """Check and time the plan's candidates on all its cases: a row each, the best ones `chosen`."""
    made = [row for case in plan.cases for row in _rows(plan, case, device, dtype)]
    best = choose(made)
    for row in made:
        row["chosen"] = row["tiles"] == best
    return made


def choose(made: Sequence[dict]) -> KernelConfig | None:
    """The best tiles by the rows of one key: None if none are right on all cases."""
    scores = []
    for tiles in _unique([row["tiles"] for row in made]):
        of_tiles = [row for row in made if row["tiles"] == tiles]
        if not any(row["failure"] for row in of_tiles):
            scores.append((sum(math.log(row["median_us"]) for row in of_tiles), tiles))
    return min(scores, key=lambda scored: scored[0])[1] if scores else None


def write(gpu: Gpu, key: Key, tiles: KernelConfig) -> Path:
    """Put one choice into the GPU's table, which stays whole at every moment; its path."""
    path = configs.TABLES / f"{gpu.name}.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    table.setdefault(key[0], {})[key[1]] = tiles
    partial_path = path.with_suffix(f".{os.getpid()}")
    jsonl.write_json(partial_path, {op: dict(sorted(table[op].items())) for op in sorted(table)})
    partial_path.replace(path)
    configs.table_of.cache_clear()
    return path


def results(gpu: Gpu) -> Path:
    """Where the rows behind a table are kept."""
    return rows.ROOT / "profiles" / "results" / gpu.name / "tune.jsonl"


def listed(plan: TuningSet) -> dict:
    """A plan as a row, for a dry run."""
    part, key = plan.key
    names = [case.name for case in plan.cases]
    return {"part": part, "key": key, "cases": names, "candidates": plan.candidates}


def display(made: Sequence[dict]) -> None:
    """The rows of `tune` as a table, or those of `listed`."""
    if made and "candidates" in made[0]:
        lines = [
            [row["part"], row["key"], text(tiles), "; ".join(row["cases"])]
            for row in made
            for tiles in row["candidates"]
        ]
        show.table("candidates", ("op", "key", "tiles", "cases"), lines)
        return
    lines = [
        [
            row["part"],
            row["key"],
            row["case"],
            text(row["tiles"]),
            f"{row['median_us']:.1f}" if row["median_us"] else "",
            f"{row['p20_us']:.1f}..{row['p80_us']:.1f}" if row["median_us"] else "",
            f"FAILED: {row['failure']}" if row["failure"] else "chosen" * row["chosen"],
        ]
        for row in made
    ]
    header = ("op", "key", "case", "tiles", " median us", " p20..p80", "")
    show.table("tile choices", header, lines)


def text(tiles: KernelConfig) -> str:
    """As in "block=1024 num_warps=4"."""
    return " ".join(f"{name}={value}" for name, value in tiles.items())


def requested_configs(case: Case, dtype: torch.dtype, gpu: Gpu) -> dict[Key, KernelConfig]:
    """The keys that a case falls into, and their tiles as they are chosen now."""
    with unfilled():
        inputs = case.inputs(0, torch.device("cpu"), dtype)
    with launches_recorded(gpu), record_configs() as asked:
        form(case.op, case.form)(inputs)()
    return asked


def _rows(plan: TuningSet, case: Case, device: torch.device, dtype: torch.dtype) -> list[dict]:
    verdicts = _verdicts(plan, case, device, dtype)
    good = [index for index, verdict in enumerate(verdicts) if not verdict.failure]
    timings: dict[str, Timing] = {}
    try:
        timings = _timings(plan, case, good, device, dtype)
    except Exception as error:  # say so in the rows of all: they were timed together
        check_poison(f"{plan.key[0]}, {plan.key[1]}", error)
        for index in good:
            verdicts[index] = replace(verdicts[index], failure=one_line(error))
    part, key = plan.key
    return [
        rows.measured(
            case.op,
            case.name,
            case.form,
            device=device,
            dtype=dtype,
            num_bytes=case.bytes(dtype),
            flops=case.flops,
            verdict=verdict,
            timing=timings.get(str(index)),
        )
        | {"part": part, "key": key, "tiles": plan.candidates[index]}
        for index, verdict in enumerate(verdicts)
    ]


def _verdicts(
    plan: TuningSet, case: Case, device: torch.device, dtype: torch.dtype
) -> list[Verdict]:
    """What the op's tolerances say of each candidate."""
    inputs = case.inputs(0, device, dtype)
    expected = reference(case, inputs)
    verdicts = []
    for tiles in plan.candidates:
        try:
            with use_config(plan.key[0], **tiles):
                verdicts.append(judge(case, form(case.op, case.form), inputs, expected))
        except Exception as error:  # one candidate must not hide the others
            check_poison(text(tiles), error)
            verdicts.append(Verdict(math.nan, math.nan, one_line(error)))
    return verdicts


def _timings(
    plan: TuningSet, case: Case, good: Sequence[int], device: torch.device, dtype: torch.dtype
) -> dict[str, Timing]:
    """Times of the candidates `good`, by their number."""
    sets = sets_for(case.bytes(dtype), device)
    calls = [form(case.op, case.form)(case.inputs(seed, device, dtype)) for seed in range(sets)]

    def call(tiles: KernelConfig, index: int) -> object:
        with use_config(plan.key[0], **tiles):
            return calls[index]()

    for index in good:  # what an op prepares once for an input must not be captured
        for one in range(sets):
            call(plan.candidates[index], one)
    forms = {str(index): partial(call, plan.candidates[index]) for index in good}
    return measure(forms, device=device, sets=sets, budget_s=BUDGET_S * len(good)) if good else {}


def _unique(choices: Sequence[KernelConfig]) -> list[KernelConfig]:
    return [tiles for index, tiles in enumerate(choices) if tiles not in choices[:index]]
