"""Everything a machine can measure in one go, as rows on disk.

Sections in order of worth: the roofline, errors of every op, the decode step, the engine's steps,
images, the op table. Rows are written as they are made, so that an interrupted or too short run
leaves what it had, and the next one with the same clean commit and device goes on from there. Needs
torch, Triton and NumPy.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from bench import images, rows
from bench.cases import cases, numerics_cases
from bench.decode import DecodeCase, time_decode
from bench.engine import time_engine
from bench.ops import DTYPES, MAIN_DTYPE, TIMED_DTYPES, check_case, one_line, time_case
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


@dataclass(frozen=True)
class Task:
    """One piece of work: rows of one (op, case, dtype) for DIR/<section>.jsonl."""

    section: str
    op: str
    case: str
    dtype: torch.dtype
    run: Callable[[], list[dict]]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.op, self.case, str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.section}: {', '.join(self.key)}"


@dataclass(frozen=True)
class Outcome:
    """The rows made now, the number of tasks found done, and the tasks left out."""

    rows: list[dict]
    kept: int
    left_out: list[Task]


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
    """Run `work` in order and write its rows to `out`; start nothing after `budget_s` seconds.

    A task that raises leaves one row that says so in `failure`. Raises InputError if `out` cannot
    be written or holds what is not rows.
    """
    end = clock() + budget_s
    _write_environment(out, device)
    done = {task.section: _done(out, task.section, device) for task in work}
    todo = [task for task in work if task.key not in done[task.section]]
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


def _done(out: Path, section: str, device: torch.device) -> set[tuple[str, str, str]]:
    """Keys of the tasks whose latest rows are all good, for this device and this clean commit."""
    commit = rows.commit()
    if commit == "unknown" or commit.endswith("+dirty"):
        return set()
    failures: dict[tuple[str, str, str], dict[str | None, str | None]] = {}
    for row in rows.read(out / f"{section}.jsonl"):
        if (row["commit"], row["device"]) == (commit, rows.device_name(device)):
            of_forms = failures.setdefault((row["op"], row["case"], row["dtype"]), {})
            of_forms.pop(None, None)  # the row of an attempt that raised, made good by this one
            of_forms[row.get("impl")] = row["failure"]
    return {key for key, of_forms in failures.items() if not any(of_forms.values())}


@cache
def _model(preset: str, device: torch.device, dtype: torch.dtype) -> Step3VL:
    return Step3VL.from_preset(preset, device=device, dtype=dtype)


def _decode(preset: str, step: DecodeCase, device: torch.device, dtype: torch.dtype) -> list[dict]:
    return time_decode(_model(preset, device, dtype), step)


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
