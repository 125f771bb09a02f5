"""A worker's side of every section: what its tasks measure. Models stay loaded between tasks."""

import json
import os
import platform
import shutil
import subprocess
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from bench.launch_sites import timed_sites
from bench.measure.devices import MAIN_DTYPE, parse_device
from bench.measure.ops import check_case, time_case
from bench.measure.origin import machine, nvidia_smi, origin
from bench.measure.pairs import check_forms, time_pairs
from bench.measure.rows import ceiling
from bench.measure.timing import keep_freed_memory
from bench.studies import images
from bench.studies.decode import DecodeCase, time_decode
from bench.studies.engine import time_engine
from bench.studies.host.launch_cost import time_launches
from bench.studies.linears import time_linear
from bench.suite import cases, numerics_cases
from bench.suite.op import Case
from kernels.runtime.configs import gpu_of
from model.config import PRESETS
from model.cuda_graph import failed_capture
from model.errors import InputError
from model.step3vl import Step3VL
from model.vision.tower import VisionTower
from pacore_sched.engine.compile_ahead import compile_ahead
from profiles.packs.kernel_pack import unpack
from profiles.runs import task_lists
from profiles.runs.pytest_tasks import run_test
from profiles.runs.task import Row, Task


class TaskRunner:
    """Runs tasks on a device: one method per section, which returns the measured rows."""

    def __init__(self, device: str | None) -> None:
        self._name = device
        self._models: dict[tuple[str, torch.dtype], Step3VL] = {}
        self._towers: dict[str, VisionTower] = {}
        keep_freed_memory()

    @cached_property
    def device(self) -> torch.device:
        """The device. Raises InputError, in answer to the first task, if it does not exist."""
        device = parse_device(self._name)
        machine(device)  # cached now: tests may change the number of threads
        return device

    def carry_out(self, task: Task) -> list[Row]:
        """Run a task and return its rows."""
        return getattr(self, task.section)(task)

    def spoiled(self) -> bool:
        """Whether this process must not measure any more, even if no task failed."""
        return failed_capture() is not None

    def task_list(self, task: Task) -> list[Row]:
        """One row: the tasks of the command `task.op`, and the machine that they are for."""
        tasks = task_lists.TASK_LISTS[task.op](self.device, **task.arguments)
        row = {"tasks": [json.loads(listed.to_json()) for listed in tasks], "failure": None}
        return [row | {"environment": environment(self.device)}]

    def probe(self, task: Task) -> list[Row]:
        """Whether a kernel runs here; if so, the last row lists the tasks of `first-light`."""
        path = task.arguments.get("kernels")
        packed = [_unpack_row(path) | origin(self.device)] if path else []
        case = next(case for case in numerics_cases() if case.op == task.op)
        checked = check_case(case, self.device, MAIN_DTYPE[self.device.type], task.forms)
        if any(row["failure"] for row in checked):
            return [*packed, *checked]
        has_kernels = any(row["failure"] is None for row in packed)
        listing = replace(task, op="first-light", arguments={"packed": has_kernels})
        return [*packed, *checked, *self.task_list(listing)]

    def compile(self, task: Task) -> list[Row]:
        """Compile everything that will be timed, in parallel processes."""
        done = compile_ahead(timed_sites(), [gpu_of(self.device)], workers=os.cpu_count())
        row: Row = {"op": task.op, "case": task.case, "impl": None, "dtype": None, "failure": None}
        row |= {"kernels": len(done.keys), "compiled": done.compiled}
        row["failure"] = next(iter(done.failures), None)
        return [row | origin(self.device)]

    def roofline(self, task: Task) -> list[Row]:
        return [ceiling(self.device, _dtype(task))]

    def numerics(self, task: Task) -> list[Row]:
        return check_forms(self._case(task), self.device, _dtype(task), task.forms)

    def ops(self, task: Task) -> list[Row]:
        budget_s, anyway = task.arguments["budget_s"], task.arguments["anyway"]
        return time_case(self._case(task), self.device, _dtype(task), task.forms, budget_s, anyway)

    def launches(self, task: Task) -> list[Row]:
        (form,), budget_s = task.forms, task.arguments["budget_s"]
        return [time_launches(self.device, _dtype(task), form, budget_s)]

    def pairs(self, task: Task) -> list[Row]:
        case, budget_s = self._case(task), task.arguments["budget_s"]
        return time_pairs(case, self.device, _dtype(task), task.forms, budget_s)

    def linears(self, task: Task) -> list[Row]:
        options = dict(task.arguments)
        config = PRESETS[options.pop("preset")].decoder
        return [time_linear(config, device=self.device, dtype=_dtype(task), **options)]

    def decode(self, task: Task) -> list[Row]:
        options = task.arguments
        return time_decode(
            self._model(options["preset"], _dtype(task)),
            DecodeCase(*options["sizes"]),
            options["budget_s"],
            names=task.forms,
            breakdown=options["breakdown"],
        )

    def engine(self, task: Task) -> list[Row]:
        options = task.arguments
        model, case = self._model(options["preset"], _dtype(task)), DecodeCase(*options["sizes"])
        return time_engine(model, case, options["steps"], options["blocks"], task.forms)

    def vision(self, task: Task) -> list[Row]:
        options = task.arguments
        config = PRESETS[options["preset"]]
        tower = self._towers.get(config.name) or images.random_tower(config, self.device)
        self._towers[config.name] = tower
        return images.encode(tower, config, options["size"], options["budget_s"], task.forms)

    def tests(self, task: Task) -> list[Row]:
        return [run_test(task.case) | origin(self.device)]

    @cached_property
    def _cases(self) -> dict[tuple[str, str], Case]:
        known = [*cases(self.device.type), *numerics_cases()]
        return {(case.op, case.name): case for case in known}

    def _case(self, task: Task) -> Case:
        return self._cases[task.op, task.case]

    def _model(self, preset: str, dtype: torch.dtype) -> Step3VL:
        key = preset, dtype
        if key not in self._models:
            self._models[key] = Step3VL.from_preset(preset, device=self.device, dtype=dtype)
        return self._models[key]


def _unpack_row(path: str) -> Row:
    """Unpack kernels; the row says whether it worked. A pack that does not fit costs only time."""
    row = {"op": "kernels", "case": Path(path).name, "impl": None, "dtype": None}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            kernels, new = unpack(Path(path))
        except InputError as error:
            return row | {"failure": str(error)}
    failure = next((str(warning.message) for warning in caught), None)
    return row | {"kernels": kernels, "new": new, "failure": failure}


def environment(device: torch.device) -> Row:
    """The machine and its software, as this process sees them."""
    row = origin(device) | {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "gcc": _first_line(["gcc", "--version"]),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return row | _gpu(device) if device.type == "cuda" else row


def _gpu(device: torch.device) -> Row:
    properties = torch.cuda.get_device_properties(device)
    fields = "clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit,temperature.gpu"
    state = nvidia_smi(fields)
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "state": state and dict(zip(fields.split(","), state.split(", "), strict=True)),
    }


def _dtype(task: Task) -> torch.dtype:
    assert task.dtype is not None, task
    return getattr(torch, task.dtype)


def _first_line(command: Sequence[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.partition("\n")[0]
