"""Work on a GPU captured once and replayed as one launch, at the addresses it was captured with."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels._kept import holding


class CudaGraph:
    """`body` as it was when captured: `replay` runs it again and returns its reused output.

    `body` runs once before it is captured, and must have no effect then that matters. Graphs of one
    `pool` (torch.cuda.graph_pool_handle) share memory and must be replayed on one stream.
    Raises RuntimeError for a body that cannot be captured.
    """

    def __init__(self, body: Callable[[], Tensor], device: torch.device, pool: object) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(stream), holding() as self._held:
                    body()  # compiles what is not compiled, fills tables
                    with torch.cuda.graph(
                        self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                    ):
                        self._output = body()
            finally:  # the caches serve what was computed, also if the rest failed
                torch.cuda.current_stream().wait_stream(stream)

    def replay(self) -> Tensor:
        self._graph.replay()
        return self._output
