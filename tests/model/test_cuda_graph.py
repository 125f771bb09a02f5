"""Tests of CUDA graph capture with other threads running: one at a time, on one stream."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from bench.measure.poison import poisons
from model import cuda_graph
from model.cuda_graph import CudaGraph


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A fake torch.cuda that counts the streams created."""
    seen = SimpleNamespace(streams=0)

    def stream(*_: object) -> SimpleNamespace:
        seen.streams += 1
        return SimpleNamespace(wait_stream=lambda other: None)

    fakes = {"CUDAGraph": SimpleNamespace, "Stream": stream, "current_device": lambda: 0}
    fakes |= {"current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None)}
    fakes |= dict.fromkeys(("device", "stream", "graph"), lambda *_, **__: nullcontext())
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    cuda_graph._stream.cache_clear()
    yield seen
    cuda_graph._stream.cache_clear()


def test_one_capture_at_a_time(counted: SimpleNamespace):
    """Guards against simultaneous captures by decode steps and the image thread, which PyTorch
    refuses, and against a new stream per graph, which would soon be one that is in use."""
    running, max_running = 0, 0

    def body() -> torch.Tensor:
        nonlocal running, max_running
        running += 1
        max_running = max(max_running, running)
        time.sleep(1e-3)
        running -= 1
        return torch.empty(0)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: CudaGraph(body, torch.device("cpu"), None), range(12)))
    assert max_running == 1 and counted.streams == 1


def test_nothing_is_captured_after_a_failed_capture(counted, monkeypatch: pytest.MonkeyPatch):
    """Guards against another capture after PyTorch's allocator is broken: it would fail with an
    internal assertion, far from its cause."""
    monkeypatch.setattr(cuda_graph, "_failures", [])

    def graph(*_: object, **__: object) -> None:
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    body = Mock()
    with pytest.raises(RuntimeError, match="^failed capture: operation not permitted$") as failed:
        CudaGraph(body, torch.device("cpu"))
    assert poisons(str(failed.value))  # for any message of PyTorch: else the next form is blamed
    assert "operation not permitted" in cuda_graph.failed_capture()
    body.reset_mock()
    with pytest.raises(RuntimeError, match="after a failed capture: operation not permitted"):
        CudaGraph(body, torch.device("cpu"))
    body.assert_not_called()


def test_an_error_before_capture_does_not_disable_graphs(counted, monkeypatch: pytest.MonkeyPatch):
    """Guards against giving up graphs for the whole process because memory was short once."""
    monkeypatch.setattr(cuda_graph, "_failures", [])
    with pytest.raises(RuntimeError, match="memory"):
        CudaGraph(Mock(side_effect=RuntimeError("out of memory")), torch.device("cpu"))
    assert cuda_graph.failed_capture() is None
    CudaGraph(Mock(), torch.device("cpu"))


@pytest.mark.gpu
def test_another_threads_work_stays_out_of_graphs():
    """Guards against capturing another thread's work: more graphs than PyTorch has streams are
    captured while a thread works on a separate stream."""
    other, x = torch.cuda.Stream(), torch.zeros(8, device="cuda")
    torch.cuda.synchronize()
    stop = False

    def work() -> int:
        steps = 0
        with torch.cuda.stream(other):
            while not stop:
                x.add_(1)
                steps += 1
                other.synchronize()
        return steps

    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(work)
        y = torch.zeros(8, device="cuda")
        graphs = [CudaGraph(lambda: y.add_(1), y.device, None) for _ in range(40)]
        stop = True
        steps = future.result()
    torch.cuda.synchronize()
    assert x.tolist() == [steps] * 8
    for graph in graphs:
        graph.replay()
    torch.cuda.synchronize()
    assert x.tolist() == [steps] * 8 and y.tolist() == [80.0] * 8  # each ran once before capture
