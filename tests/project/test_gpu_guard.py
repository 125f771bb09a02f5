"""Tests of the GPU guard without a GPU: which tests are marked, and what a CUDA error costs."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import xdist.newhooks
from xdist.workermanage import WorkerController

from tests.support import ROOT, gpu_guard

pytestmark = pytest.mark.cli

# Collects as on a machine with a GPU, and prints for each test whether -m selected it.
COLLECT = """
import pytest, sys, torch
torch.cuda.is_available = lambda: True

class Listing:
    def pytest_deselected(self, items):
        self.show("no", items)

    def pytest_collection_finish(self, session):
        self.show("yes", session.items)

    def show(self, selected, items):
        for item in items:
            print("item", selected, "triton_device" in item.fixturenames, item.nodeid)

pytest.main(["--collect-only", "-qq", "-m", "gpu", *sys.argv[1:]], plugins=[Listing()])
"""

# A fake GPU that, like a CUDA context, fails after an illegal access until its process ends.
CONFTEST = """
import pytest
from tests.support import gpu_guard
from tests.support.gpu_guard import *

pending = []

def synchronise():
    if pending:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

gpu_guard.has_gpu = lambda: True
gpu_guard.synchronise = synchronise

@pytest.fixture
def launch():
    return pending.append
"""
GOOD = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("i", range(20))
def test_good(i):
    pass
"""
WRAPPED = """try:
        raise RuntimeError('CUDA error: unknown error')
    except RuntimeError as error:
        raise ValueError('no result') from error"""
BAD = {
    "test_access": "launch('bad kernel')",
    "test_wrapped": WRAPPED,
    "test_capture": "raise RuntimeError('!block->private INTERNAL ASSERT FAILED at x.cpp:1')",
    "test_triton": "raise RuntimeError('Triton Error [CUDA]: misaligned address')",
}
HARMLESS = {
    "test_wrong": "assert 1 == 2",
    "test_memory": "raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')",
}


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TRITON"))}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tests that poison a GPU and tests that only fail, between good ones."""
    files = {"conftest.py": CONFTEST, "test_a.py": GOOD, "test_z.py": GOOD}
    files["pytest.ini"] = "[pytest]\nmarkers = gpu\n"
    for name, body in (BAD | HARMLESS).items():
        files["test_m.py"] = files.get("test_m.py", "import pytest\n") + (
            f"@pytest.mark.gpu\ndef {name}(launch):\n    {body}\n"
        )
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_every_test_on_the_gpu_is_marked():
    """Guards `pytest -m gpu`, which left out most Triton tests: those with `triton_device`."""
    files = [str(path) for path in (ROOT / "tests").rglob("test_*.py")]
    files = [path for path in files if "triton_device" in Path(path).read_text()]
    done = python("-c", COLLECT, *files)
    items = [line.split(" ", 3)[1:] for line in done.stdout.splitlines() if line[:5] == "item "]
    on_gpu = [(selected, name) for selected, fixture, name in items if fixture == "True"]
    assert len(on_gpu) > 300, done.stdout[-2000:] + done.stderr[-2000:]
    assert [name for selected, name in on_gpu if selected == "no"] == []
    plain = [name for selected, _, name in items if selected == "no"]
    assert any(name.endswith("test_every_test_on_the_gpu_is_marked") for name in plain)


def test_a_cuda_error_costs_one_test(folder: Path):
    """Guards against one illegal access that fails every later test of its process, and against
    blaming the next test: the error shows only when the device is synchronised."""
    run = python("-m", "pytest", "-n", "2", "-rA", "--tb=line", cwd=folder)
    lines = [line.split(" - ")[0].split() for line in run.stdout.splitlines()]
    passed = {line[1] for line in lines if line[:1] == ["PASSED"]}
    failed = {line[1].split("::")[1] for line in lines if line[:1] == ["FAILED"]}
    assert len(passed) == 40, run.stdout
    assert failed == BAD.keys() | HARMLESS.keys()
    assert run.stdout.count("replacing crashed worker") == len(BAD)
    assert "RuntimeError: CUDA error: an illegal memory access was encountered" in run.stdout


def test_the_controller_outlives_a_worker_that_ends_as_it_sends():
    """Guards against the end of the whole session when tests are sent to a worker whose end is not
    yet known. That window is too short for a test, so the worker here has no process."""
    node: Any = WorkerController.__new__(WorkerController)
    node.log = lambda *_: None
    sent = []
    node.channel = SimpleNamespace(send=sent.append)
    gpu_guard.pytest_testnodeready(node)
    node.send_runtest_some([1, 2])
    assert sent == [("runtests", {"indices": [1, 2]})]

    def broken(_: object) -> None:
        raise OSError("cannot send (already closed?)")

    node.channel.send = broken
    node.send_runtest_some([3])
    assert hasattr(xdist.newhooks, "pytest_testnodeready")


def test_a_cuda_error_ends_a_single_process(folder: Path):
    """Guards a run without xdist: it ends with one line that names the test, not false failures."""
    run = python("-m", "pytest", "--tb=line", cwd=folder)
    (line,) = [line for line in run.stdout.splitlines() if "Exit: a CUDA error" in line]
    assert "test_m.py::test_access" in line
    assert run.returncode == 1
    assert "20 passed" in run.stdout and "1 failed" in run.stdout
