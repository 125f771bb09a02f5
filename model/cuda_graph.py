"""Work on a GPU captured once and replayed as one launch, at the addresses it was captured with."""

from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from kernels.runtime.tensor_cache import pinning

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE as Pool  # what `torch.cuda.graph_pool_handle` returns

T = TypeVar("T")

_capturing = Lock()  # PyTorch allows one capture at a time; images are encoded in a thread
_failures: list[str] = []


def failed_capture() -> str | None:
    """Why a capture failed in this process, if one did.

    PyTorch (2.11) then leaves the allocator's pool open: `torch.cuda.empty_cache()`, and with it
    every later capture, raises an internal assertion. Plain work goes on; whoever measures should
    end the process.
    """
    return _failures[0] if _failures else None


class CudaGraph(Generic[T]):
    """`body` as it was when captured: `replay` runs it again and returns its reused output.

    `body` runs once before it is captured, and must have no effect then that matters. Graphs of one
    `pool` (torch.cuda.graph_pool_handle) share memory and must be replayed on one stream. Threads
    that capture wait for each other. Raises RuntimeError for a body that cannot be captured, and
    for every body after that (`failed_capture`).
    """

    def __init__(
        self, body: Callable[[], T], device: torch.device, pool: "Pool | None" = None
    ) -> None:
        if _failures:
            raise RuntimeError(f"no CUDA graph after a {_failures[0]}")
        self._graph = torch.cuda.CUDAGraph()
        with _capturing, torch.cuda.device(device):
            stream = _stream(torch.cuda.current_device())
            stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(stream), pinning() as self._pinned:
                    body()  # compiles what is not compiled, fills tables
                    self._output = self._capture(body, pool, stream)
            finally:  # the caches serve what was computed, also if the rest failed
                torch.cuda.current_stream().wait_stream(stream)

    def replay(self) -> T:
        self._graph.replay()
        return self._output

    def _capture(self, body: Callable[[], T], pool: "Pool | None", stream: torch.cuda.Stream) -> T:
        try:
            with torch.cuda.graph(
                self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                return body()
        except Exception as error:  # in words that are the same whatever the cause
            _failures.append(f"failed capture: {error}")
            raise RuntimeError(_failures[0]) from error


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """The stream that all graphs of a GPU are captured on.

    PyTorch has 32 streams and hands them out over and over: with a new one for each graph, one
    would be the stream on which images are encoded meanwhile, and that work end up in the graph.
    """
    return torch.cuda.Stream(device)
