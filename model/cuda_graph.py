"""CUDA graphs: a function's GPU work, captured once and replayed as one launch."""

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
    """Why the first failed capture of this process failed; None if none has.

    After a failed capture, PyTorch (2.11) leaves the allocator's pool open: every
    `torch.cuda.empty_cache()`, and so every later capture, raises an internal assertion. Work
    without graphs still runs, but a process that measures should end.
    """
    return _failures[0] if _failures else None


class CudaGraph(Generic[T]):
    """The GPU work of `body`, captured: `replay` runs it again at the captured addresses and
    returns the same output tensors, overwritten.

    `body` first runs once uncaptured, which must be harmless. Graphs of one `pool`
    (torch.cuda.graph_pool_handle) share memory and must be replayed on one stream. Threads that
    capture wait for each other. Raises RuntimeError if the capture fails, and for every graph
    after that (`failed_capture`).
    """

    def __init__(
        self, body: Callable[[], T], device: torch.device, pool: "Pool | None" = None
    ) -> None:
        if _failures:
            raise RuntimeError(
                f"this process can capture no more CUDA graphs after a {_failures[0]}"
            )
        self._graph = torch.cuda.CUDAGraph()
        with _capturing, torch.cuda.device(device):
            stream = _stream(torch.cuda.current_device())
            stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(stream), pinning() as self._pinned:
                    body()  # compiles kernels and fills caches before the capture
                    self._output = self._capture(body, pool, stream)
            finally:  # caches were filled on `stream` and serve other streams, even if this failed
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
        except Exception as error:  # one wording for every cause
            _failures.append(f"failed capture: {error}")
            raise RuntimeError(_failures[0]) from error


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """The stream on which all graphs of a GPU are captured.

    PyTorch hands out its 32 streams in rotation. With a new stream for each graph, one would
    eventually be the stream on which images are being encoded, and that work would be captured too.
    """
    return torch.cuda.Stream(device)
