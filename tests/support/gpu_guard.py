"""Pytest hooks for tests on a GPU: the mark `gpu`, and the end of a process after a CUDA error.

Every test that runs a kernel on a GPU has the mark `gpu`, and no other test sees the GPU. Without a
GPU, tests that need one are skipped. A CUDA error poisons its process: each later test on the GPU
would fail with it. So the device is synchronised at the end of every such test, and an error, there
or before, ends the process during that test, once its report is sent: pytest-xdist blames this test
and replaces the worker. Without xdist the session ends.

A conftest.py activates the hooks by importing them.
"""

import contextlib
import os
from collections.abc import Generator
from typing import Any

import pytest

from bench.measure.poison import poisons


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
    """Mark the tests that run on the GPU, or without one, skip those that need it."""
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
    """Hide the GPU from a test without the mark, and from processes that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        if has_gpu() and not _on_gpu(item):
            patch.setattr("torch.cuda.is_available", lambda: False)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Wait at the end of a GPU test for its kernels, so that their errors are attributed to it."""
    try:
        return (yield)
    finally:
        if _on_gpu(item):
            synchronise()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note in the report whether the process is poisoned."""
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
        f"a CUDA error in {report.nodeid}: this process can no longer use the GPU, so the remaining"
        " tests were not run (pytest-xdist, as in make test-gpu, would run them)",
        returncode=1,
    )


@pytest.hookimpl(optionalhook=True)  # a hook of xdist, in its controller
def pytest_testnodeready(node: Any) -> None:
    """Ignore a broken pipe when tests are sent to a worker that has just ended.

    The controller learns next that the process ended, and xdist then gives those tests to another;
    but the broken pipe would end the whole session first.
    """
    send = node.sendcommand

    def sendcommand(name: str, **arguments: object) -> None:
        with contextlib.suppress(OSError):
            send(name, **arguments)

    node.sendcommand = sendcommand


def _on_gpu(item: pytest.Item) -> bool:
    return item.get_closest_marker("gpu") is not None


def _poisons(error: BaseException | None) -> bool:
    """Whether the error, or one that led to it, poisons the process."""
    while error is not None:
        if poisons(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
