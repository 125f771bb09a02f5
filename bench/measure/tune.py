"""Kernel configs by measurement: for every input class of an op, the candidates that its module
offers are checked and timed together in one run, and the best is written to the GPU's table.

An input class may contain several cases: the best candidate is right on all of them and has the
smallest geometric mean of its times.
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

from bench.measure.origin import ROOT
from bench.measure.poison import check_poison
from bench.measure.rows import measured
from bench.measure.timing import Timing, measure, sets_for
from bench.measure.verdicts import Verdict, judge, reference
from bench.rows import jsonl
from bench.rows.formats import config_text
from bench.suite import in_modes
from bench.suite.forms import form
from bench.suite.op import Case
from kernels.compile.launches import launches_recorded
from kernels.compile.unfilled import unfilled
from kernels.errors import ImplError, one_line
from kernels.runtime import configs
from kernels.runtime.configs import TUNABLES, Gpu, KernelConfig, record_configs, use_config
from model.errors import InputError

BUDGET_S = 0.2  # of timing, per candidate and case
Key = tuple[str, str]  # an op or a part of one that has configs, and the class of its inputs


@dataclass(frozen=True)
class TuningSet:
    """What to measure for one key: the cases of its input class and the configs to try."""

    key: Key
    cases: list[Case]
    candidates: list[KernelConfig]  # the current config comes first


def tuning_sets(cases: Sequence[Case], dtype: torch.dtype, gpu: Gpu) -> list[TuningSet]:
    """The keys of `cases` on `gpu`, with their cases and candidates. Nothing runs on a device.

    Ops without a Triton form have no keys.
    """
    by_key: dict[Key, tuple[list[Case], KernelConfig]] = {}
    for case in in_modes(cases):
        try:
            requested = requested_configs(case, dtype, gpu)
        except ImplError:
            continue
        for key, config in requested.items():
            by_key.setdefault(key, ([], config))[0].append(case)
    return [
        TuningSet(key, key_cases, _unique([config, *TUNABLES[key[0]].candidates(key[1], gpu)]))
        for key, (key_cases, config) in by_key.items()
    ]


def check_compiles() -> None:
    """Raise InputError if Triton interprets: launches would run instead of being recorded."""
    if triton.knobs.runtime.interpret:
        raise InputError("TRITON_INTERPRET is set: unset it, because this needs Triton to compile")


def tune(tuning_set: TuningSet, device: torch.device, dtype: torch.dtype) -> list[dict]:
    """Check and time the candidates on all cases of the set: a row each, the best ones `chosen`."""
    measured = [row for case in tuning_set.cases for row in _rows(tuning_set, case, device, dtype)]
    best = choose(measured)
    for row in measured:
        row["chosen"] = row["tiles"] == best
    return measured


def choose(measured: Sequence[dict]) -> KernelConfig | None:
    """The best config by the rows of one key; None if no config is right on all cases."""
    scores = []
    for config in _unique([row["tiles"] for row in measured]):
        config_rows = [row for row in measured if row["tiles"] == config]
        if not any(row["failure"] for row in config_rows):
            scores.append((sum(math.log(row["median_us"]) for row in config_rows), config))
    return min(scores, key=lambda scored: scored[0])[1] if scores else None


def write(gpu: Gpu, key: Key, config: KernelConfig) -> Path:
    """Put a config into the GPU's table, replacing the file atomically; returns its path."""
    path = configs.TABLES / f"{gpu.name}.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    table.setdefault(key[0], {})[key[1]] = config
    partial_path = path.with_suffix(f".{os.getpid()}")
    jsonl.write_json(partial_path, {op: dict(sorted(table[op].items())) for op in sorted(table)})
    partial_path.replace(path)
    configs.table_of.cache_clear()
    return path


def results(gpu: Gpu) -> Path:
    """Where the rows that a table is based on are kept."""
    return ROOT / "profiles" / "results" / gpu.name / "tune.jsonl"


def listed(tuning_set: TuningSet) -> dict:
    """A tuning set as a row, for a dry run."""
    part, key = tuning_set.key
    names = [case.name for case in tuning_set.cases]
    return {"part": part, "key": key, "cases": names, "candidates": tuning_set.candidates}


def requested_configs(case: Case, dtype: torch.dtype, gpu: Gpu) -> dict[Key, KernelConfig]:
    """The keys that a case uses on `gpu`, and their current configs."""
    with unfilled():
        inputs = case.inputs(0, torch.device("cpu"), dtype)
    with launches_recorded(gpu), record_configs() as requested:
        form(case.op, case.form)(inputs)()
    return requested


def _rows(
    tuning_set: TuningSet, case: Case, device: torch.device, dtype: torch.dtype
) -> list[dict]:
    verdicts = _verdicts(tuning_set, case, device, dtype)
    correct = [index for index, verdict in enumerate(verdicts) if not verdict.failure]
    timings: dict[str, Timing] = {}
    try:
        timings = _timings(tuning_set, case, correct, device, dtype)
    except Exception as error:  # recorded in all their rows: they were timed together
        check_poison(f"{tuning_set.key[0]}, {tuning_set.key[1]}", error)
        for index in correct:
            verdicts[index] = replace(verdicts[index], failure=one_line(error))
    part, key = tuning_set.key
    return [
        measured(
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
        | {"part": part, "key": key, "tiles": tuning_set.candidates[index]}
        for index, verdict in enumerate(verdicts)
    ]


def _verdicts(
    tuning_set: TuningSet, case: Case, device: torch.device, dtype: torch.dtype
) -> list[Verdict]:
    """The verdict on each candidate, by the op's tolerances."""
    inputs = case.inputs(0, device, dtype)
    expected = reference(case, inputs)
    verdicts = []
    for config in tuning_set.candidates:
        try:
            with use_config(tuning_set.key[0], **config):
                verdicts.append(judge(case, form(case.op, case.form), inputs, expected))
        except Exception as error:  # one candidate must not hide the others
            check_poison(config_text(config), error)
            verdicts.append(Verdict(math.nan, math.nan, one_line(error)))
    return verdicts


def _timings(
    tuning_set: TuningSet,
    case: Case,
    correct: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Timing]:
    """Times of the candidates with the indices `correct`, by index."""
    sets = sets_for(case.bytes(dtype), device)
    calls = [form(case.op, case.form)(case.inputs(seed, device, dtype)) for seed in range(sets)]

    def call(config: KernelConfig, index: int) -> object:
        with use_config(tuning_set.key[0], **config):
            return calls[index]()

    for candidate in correct:  # what an op prepares once per input must not be captured
        for set_index in range(sets):
            call(tuning_set.candidates[candidate], set_index)
    forms = {
        str(candidate): partial(call, tuning_set.candidates[candidate]) for candidate in correct
    }
    return (
        measure(forms, device=device, sets=sets, budget_s=BUDGET_S * len(correct))
        if correct
        else {}
    )


def _unique(candidates: Sequence[KernelConfig]) -> list[KernelConfig]:
    return [config for index, config in enumerate(candidates) if config not in candidates[:index]]
