"""Tests on a GPU: which ones they are, and what happens after a CUDA error.

Every test that runs a kernel on a GPU carries the mark `gpu`, and no other test sees the GPU; where
there is none, those that need one skip. A CUDA error poisons its process: each later test on the
GPU would fail with it. So the device is synchronised at the end of every such test, and an error,
there or before, ends the process inside that test, once its report is sent: pytest-xdist blames
this test and replaces the worker. Without xdist the session ends.

The hooks are in force where a conftest.py imports them.
"""

import contextlib
import os
from collections.abc import Generator
from typing import Any

import pytest

from bench.poison import poisons


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def synchronise() -> None:
    """Wait for the GPU; raises the errors of kernels that were launched before."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs on the GPU that is here, or skip what would need one."""
    for item in items:
        if has_gpu():
            if "triton_device" in item.fixturenames:
                item.add_marker("gpu")
            continue
        if {"triton_device", "interpreter"} & {*item.fixturenames}:
            item.add_marker("interpreter")
        if _on_gpu(item):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Hide the GPU from a test without the mark, and from the processes that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        if has_gpu() and not _on_gpu(item):
            patch.setattr("torch.cuda.is_available", lambda: False)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """A test on the GPU lasts until its kernels are done: their errors are its own."""
    try:
        return (yield)
    finally:
        if _on_gpu(item):
            synchronise()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note in the report whether the process is lost."""
    report = yield
    report.poisoned = bool(call.excinfo and _on_gpu(item) and _poisons(call.excinfo.value))
    return report


@pytest.hookimpl(trylast=True)  # an xdist worker has sent the report by then
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """End a poisoned process; xdist's controller sees the same reports, with their `node`."""
    if hasattr(report, "node") or not getattr(report, "poisoned", False):
        return
    if "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)
    pytest.exit(
        f"a CUDA error in {report.nodeid}: this process cannot use the GPU any more, and the other"
        " tests were not run (with pytest-xdist, as in make test-gpu, they are)",
        returncode=1,
    )


@pytest.hookimpl(optionalhook=True)  # xdist's, in its controller
def pytest_testnodeready(node: Any) -> None:
    """Send tests to a worker that has just ended without an error of our own.

    That its process ended is the next thing the controller hears of it, and then xdist gives those
    tests to another; but the broken pipe would end the whole session before.
    """
    send = node.sendcommand

    def sendcommand(name: str, **arguments: object) -> None:
        with contextlib.suppress(OSError):
            send(name, **arguments)

    node.sendcommand = sendcommand


def _on_gpu(item: pytest.Item) -> bool:
    return item.get_closest_marker("gpu") is not None


def _poisons(error: BaseException | None) -> bool:
    """Whether the error, or one that led to it, is of the kind that a process does not survive."""
    while error is not None:
        if poisons(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
