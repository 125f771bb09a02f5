"""`python -m profiles record --out DIR`: all that a machine can measure in one go, as rows on disk.

Sections in order of worth: the roofline, errors of every op, the decode step, the engine's steps,
images, the op table. Rows are written as they are made, so that an interrupted or too short run
leaves what it had, and the next one with the same clean commit and device goes on from there. Needs
torch, Triton and NumPy.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bench import images, rows, show
from bench.cases import cases, numerics_cases
from bench.decode import DecodeCase, time_decode
from bench.engine import time_engine
from bench.ops import (
    DTYPES,
    MAIN_DTYPE,
    TIMED_DTYPES,
    check_case,
    device_named,
    one_line,
    time_case,
)
from model.config import PRESETS, Config
from model.step3vl import Step3VL
from model.terminal import InputError, progress
from model.vision import VisionTower

DECODE = {
    "cpu": ("tiny", [DecodeCase(1, 256, 64), DecodeCase(4, 256, 64)]),
    "cuda": ("step3-vl-10b", [DecodeCase(batch, 2048, 512) for batch in (16, 64, 1)]),
}

# Cases, steps in a block, blocks: no more than `bench engine` does.
ENGINE = {
    "cpu": ("tiny", [DecodeCase(4, 256, 16)], 6, 2),
    "cuda": ("step3-vl-10b", [DecodeCase(batch, 2048, 128) for batch in (64, 16, 32)], 32, 3),
}


Key = tuple[str, str, str]  # op, case, dtype
MISSING = False, ""  # sorts before when rows were taken


@dataclass(frozen=True)
class Task:
    """One piece of work: rows of one (op, case, dtype) for DIR/<section>.jsonl."""

    section: str
    op: str
    case: str
    dtype: torch.dtype
    run: Callable[[], list[dict]]

    @property
    def key(self) -> Key:
        return self.op, self.case, str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.section}: {', '.join(self.key)}"


@dataclass(frozen=True)
class Outcome:
    """The rows made now, the number of tasks found done, and the tasks left out."""

    rows: list[dict]
    kept: int
    left_out: list[Task]


ORDER = """\
Work that the folder has no rows of comes first: the roofline, errors of every op, the decode step,
the engine's steps, images, the op table. Then what has rows of another commit, or failed, is
measured anew, the oldest rows first. Rows of this very commit are left as they are, if it is clean.
So runs that are too short for everything fill the folder first, and renew it then.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = ORDER
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--budget",
        type=float,
        default=450.0,
        metavar="SECONDS",
        help="start no new case after this time (default: 450)",
    )
    parser.add_argument("--section", nargs="+", default=(), help="these only (default: all)")
    parser.add_argument("--shape", default="", metavar="TEXT", help="TEXT in the op or case only")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--json", action="store_true", help="no tables; end with one JSON document")


def run(options: argparse.Namespace) -> int:
    """Measure; 1 if a row failed."""
    if options.budget <= 0:
        raise InputError(f"--budget must be a positive number of seconds, not {options.budget}")
    device = device_named(options.device)
    work = select(list(tasks(device)), options.section, options.shape)
    outcome = record(options.out, device, work, options.budget)
    if options.json:
        left_out = [str(task) for task in outcome.left_out]
        print(json.dumps({"rows": outcome.rows, "kept": outcome.kept, "left_out": left_out}))
    else:
        _show(outcome, options.out)
    return int(any(row["failure"] for row in outcome.rows))


def tasks(device: torch.device) -> Iterator[Task]:
    """All that `device` can measure, most worthwhile first."""
    main = MAIN_DTYPE[device.type]
    for dtype in TIMED_DTYPES[device.type]:
        run = partial(lambda dtype: [rows.ceiling(device, dtype)], dtype)
        yield Task("roofline", "roofline", "copy, matrix product", dtype, run)
    checks = [(case, dtype) for dtype in DTYPES for case in numerics_cases()]
    checks += [(case, main) for case in cases(device.type)]
    for case, dtype in checks:
        run = partial(check_case, case, device, dtype)
        yield Task("numerics", case.op, case.name, dtype, run)
    preset, steps = DECODE[device.type]
    for step in steps:
        run = partial(_decode, preset, step, device, main)
        yield Task("decode", "decode_step", f"{preset} {step.name}", main, run)
    preset, steps, *length = ENGINE[device.type]
    for step in steps:
        run = partial(_engine, preset, step, *length, device, main)
        yield Task("engine", "engine_step", f"{preset} {step.name}", main, run)
    config = PRESETS[images.MODELS[device.type]]
    for size in images.SIZES:
        run = partial(_encode, config, size, device)
        yield Task("vision", "vision", images.case_name(config, size), main, run)
    for case in cases(device.type):
        yield Task("ops", case.op, case.name, main, partial(time_case, case, device, main))


def record(
    out: Path,
    device: torch.device,
    work: Sequence[Task],
    budget_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Outcome:
    """Run `work` in the order of ORDER and write its rows to `out`; start nothing after `budget_s`
    seconds.

    A task that raises leaves one row that says so in `failure`. Raises InputError if `out` cannot
    be written or holds what is not rows.
    """
    end = clock() + budget_s
    _write_environment(out, device)
    known = {task.section: _known(out, task.section, device) for task in work}
    todo = [task for task in work if task.key not in known[task.section].done]
    todo.sort(key=lambda task: known[task.section].taken.get(task.key, MISSING))
    made: list[dict] = []
    section = None
    with progress("record", len(todo)) as advance:
        for position, task in enumerate(todo):
            if clock() >= end:
                return Outcome(made, len(work) - len(todo), todo[position:])
            if task.section != section:
                _release_memory()
                section = task.section
            new = _attempt(task, device)
            rows.append(out / f"{task.section}.jsonl", new)
            made += new
            advance(1)
    return Outcome(made, len(work) - len(todo), [])


def select(work: Sequence[Task], sections: Sequence[str], text: str) -> list[Task]:
    """The tasks of `sections` (all if empty) with `text` in their op or case.

    Raises InputError for an unknown section and if nothing is left.
    """
    known = list(dict.fromkeys(task.section for task in work))
    for section in sections:
        if section not in known:
            raise InputError(f"unknown section {section!r}; choose of {', '.join(known)}")
    chosen = [task for task in work if not sections or task.section in sections]
    chosen = [task for task in chosen if text in f"{task.op} {task.case}"]
    if not chosen:
        raise InputError(f"no case of these sections has {text!r} in its op or name")
    return chosen


def _attempt(task: Task, device: torch.device) -> list[dict]:
    try:
        return task.run()
    except Exception as error:  # one task must not end the others
        op, case, dtype = task.key
        failed = {"op": op, "case": case, "impl": None, "dtype": dtype}
        return [failed | {"failure": one_line(error)} | rows.origin(device)]


class _Known(NamedTuple):
    """What a folder has of a section from this device, by the tasks' keys."""

    done: set[Key]  # whose latest rows are all good, of this clean commit
    taken: dict[Key, tuple[bool, str]]  # when the latest rows of any commit were


def _known(out: Path, section: str, device: torch.device) -> _Known:
    commit, taken = rows.commit(), {}
    clean = commit != "unknown" and not commit.endswith("+dirty")
    failures: dict[Key, dict[str | None, str | None]] = {}
    for row in rows.read(out / f"{section}.jsonl"):
        if row["device"] != rows.device_name(device):
            continue
        key = row["op"], row["case"], row["dtype"]
        taken[key] = True, row.get("time", "")
        if clean and row["commit"] == commit:
            of_forms = failures.setdefault(key, {})
            of_forms.pop(None, None)  # the row of an attempt that raised, made good by this one
            of_forms[row.get("impl")] = row["failure"]
    return _Known({key for key, of in failures.items() if not any(of.values())}, taken)


@cache
def _model(preset: str, device: torch.device, dtype: torch.dtype) -> Step3VL:
    return Step3VL.from_preset(preset, device=device, dtype=dtype)


def _decode(preset: str, step: DecodeCase, device: torch.device, dtype: torch.dtype) -> list[dict]:
    return time_decode(_model(preset, device, dtype), step, breakdown=True)


def _engine(
    preset: str,
    step: DecodeCase,
    steps: int,
    blocks: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[dict]:
    return time_engine(_model(preset, device, dtype), step, steps, blocks)


@cache
def _tower(config: Config, device: torch.device) -> VisionTower:
    return images.random_tower(config, device)


def _encode(config: Config, size: tuple[int, int], device: torch.device) -> list[dict]:
    return images.encode(_tower(config, device), config, size)


def _release_memory() -> None:
    """Drop the models and the allocator's blocks: the next section needs neither."""
    _model.cache_clear()
    _tower.cache_clear()
    torch.cuda.empty_cache()


def _write_environment(out: Path, device: torch.device) -> None:
    """DIR/environment.json: the machine and its software, as this run found them."""
    found = rows.origin(device) | {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device.type == "cuda":
        found |= _gpu(device)
    rows.write_json(out / "environment.json", found)


def _gpu(device: torch.device) -> dict:
    properties = torch.cuda.get_device_properties(device)
    fields = "clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit,temperature.gpu"
    state = rows.nvidia_smi(fields)
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "state": state and dict(zip(fields.split(","), state.split(", "), strict=True)),
    }


def _show(outcome: Outcome, out: Path) -> None:
    timed = [row for row in outcome.rows if row.get("p20_us")]
    if timed:
        show.times(timed)
    failed = [row for row in outcome.rows if row["failure"]]
    for row in failed:
        print(
            f"FAILED: {row['op']}, {row['case']}, {row['impl']}, {row['dtype']}: {row['failure']}"
        )
    print(
        f"{len(outcome.rows)} rows written to {out}, {len(failed)} of them failed;"
        f" {outcome.kept} cases were already there"
    )
    if outcome.left_out:
        counts = Counter(task.section for task in outcome.left_out)
        text = ", ".join(f"{count} of {section}" for section, count in counts.items())
        print(f"the budget left out {text}; run again to go on", file=sys.stderr)
