"""Warm-up: kernels compiled before a run launches them, in separate processes, for a forced GPU.

What a later compilation finds in Triton's cache is checked in another process: Triton interprets in
pytest's.
"""

import json
import os
import pickle
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
import triton

from bench.__main__ import main
from bench.cli import commands
from bench.launch_sites import case_sites
from bench.suite import numerics_cases
from kernels.runtime.configs import H200
from model.config import PRESETS
from model.step3vl import Step3VL
from pacore_sched.engine import compile_ahead, executor
from pacore_sched.engine.compile_ahead import warm_up
from tests.support import ROOT

pytestmark = pytest.mark.cli

CUDA = torch.device("cuda")
LOOK_UP = """
import json, pickle, sys
import triton
from kernels.compile.launches import compiler
from kernels.compile.worker import launches_of
from kernels.runtime.configs import H200

hits = []
triton.knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)
for site in pickle.load(sys.stdin.buffer):
    launches = launches_of(site, H200)
    with compiler(H200):
        for launch in launches:
            launch.compile()
print(json.dumps(hits))
"""


def cheap_sites() -> list[Callable]:
    return case_sites(
        (case, torch.float16) for case in numerics_cases() if case.op in ("silu_mul", "rms_norm")
    )


def without_interpreter(module: str, *arguments: str, stdin: bytes = b"") -> str:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, input=stdin, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.decode()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Triton's cache, empty, on a machine that appears to have an H200."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("PACORE_WARM_UP", raising=False)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(compile_ahead, "gpu_of", lambda device: H200)
    return tmp_path / "cache"


def warnings_of(sites: Sequence[Callable], device: torch.device = CUDA) -> list[str]:
    """The warnings of a warm-up."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warm_up(sites, device)
    return [str(warning.message) for warning in caught]


def test_what_is_launched_later_is_in_the_cache(cache):
    """Guards against a first answer or timing on a GPU that waits for the compiler: cache keys
    recorded by other processes must be those that launches look up."""
    sites = cheap_sites()
    assert warnings_of(sites) == []
    hits = json.loads(without_interpreter("-c", LOOK_UP, stdin=pickle.dumps(sites)))
    assert len(hits) > 3 and all(hits)


def test_a_second_run_starts_no_process(cache, monkeypatch):
    """Guards the cost of a warm cache: importing PyTorch eight times takes seconds."""
    sites = cheap_sites()[:1]
    assert warnings_of(sites) == []
    monkeypatch.setattr(compile_ahead, "_Pool", None)
    assert warnings_of(sites) == []
    for binary in cache.glob("*/*.cubin"):  # missing ones are compiled again
        binary.unlink()
    assert len(warnings_of(sites)) == 1


def test_a_failure_is_only_a_warning(cache, monkeypatch):
    """A site that raises, or a process that dies, must not stop the run, nor keep other sites from
    being compiled."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})  # one process, then another
    sites = cheap_sites()[:1]
    (warning,) = warnings_of([partial(os._exit, 7), partial(int, "x"), *sites])
    assert "at first use" in warning and "exit code 7" in warning and "\n" not in warning
    assert list(cache.glob("*/*.cubin"))
    assert "invalid literal" in warnings_of([partial(int, "x")])[0]


def test_a_process_that_hangs_is_stopped(cache, monkeypatch):
    """Guards the run against a compiler that never returns."""
    monkeypatch.setattr(compile_ahead, "LIMIT_S", 3.0)
    start = time.perf_counter()
    assert "not done in 3 s" in warnings_of([partial(time.sleep, 1000)] * 3)[0]
    assert time.perf_counter() - start < 30


def test_only_gpus_are_warmed_up(cache, monkeypatch):
    """Guards CPU users, and those who disable warm-up, against minutes of useless compiling."""
    monkeypatch.setattr(compile_ahead, "_Pool", None)
    assert warnings_of(cheap_sites(), torch.device("cpu")) == []
    monkeypatch.setenv("PACORE_WARM_UP", "0")
    assert warnings_of(cheap_sites()) == []


def test_the_sites_are_all_that_an_engine_launches():
    """Guards the list of sites: a missing kernel is compiled in the middle of a run."""
    assert json.loads(without_interpreter("-m", "tests.support.engine_launches")) == {}


class Reached(Exception):
    """Raised instead of warming up."""


@pytest.mark.parametrize("command", ["numerics --op silu_mul", "ops --op sample", "decode"])
def test_the_benchmarks_warm_up_before_they_measure(command, monkeypatch):
    """Guards the hook: without it the first row waits for the compiler."""

    def reached(sites: Sequence[Callable], device: torch.device) -> None:
        raise Reached if sites and device == torch.device("cpu") else AssertionError

    monkeypatch.setattr(commands, "warm_up", reached)
    with pytest.raises(Reached):
        main([*command.split(), "--device", "cpu"])


@pytest.mark.parametrize("impl", [None, "triton", "eager"])
def test_an_engine_warms_up_unless_it_is_eager(impl, monkeypatch):
    """Guards the hook, and eager engines against waiting for kernels that they do not launch."""
    site_counts = []
    monkeypatch.setattr(executor, "warm_up", lambda sites, device: site_counts.append(len(sites)))
    model = Step3VL(PRESETS["tiny"], impl=impl)
    executor.ModelExecutor(model, num_pages=8, max_running=2).close()
    assert len(site_counts) == (impl != "eager") and all(site_counts)
