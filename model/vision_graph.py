"""CUDA graphs of the vision tower, for batches of views whose grids return.

Of few views the tower is hundreds of short launches, and the host may be slower than the GPU; a
graph is one launch. Captured with it are the addresses of weights, tables and buffers: whoever
changes weights clears the graphs (`VisionTower.prepare` does).
"""

import warnings
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from kernels._kept import holding
from model.lru import Lru


class CudaGraph:
    """`body` captured once; called with new inputs, it replays and returns its reused output."""

    def __init__(self, body: Callable[[Tensor], Tensor], inputs: Tensor, pool: object) -> None:
        self._inputs, self._graph = inputs.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.device(inputs.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(stream), holding() as self._held:
                    body(self._inputs)  # compiles what is not compiled, fills tables
                    with torch.cuda.graph(
                        self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                    ):
                        self._output = body(self._inputs)
            finally:  # the caches serve what was computed, also if the rest failed
                torch.cuda.current_stream().wait_stream(stream)

    def __call__(self, inputs: Tensor) -> Tensor:
        self._inputs.copy_(inputs)
        self._graph.replay()
        return self._output


class Graphs:
    """Graphs by key, each captured when its key comes a second time.

    At most `max_graphs`, those used last, in one memory pool, so that they take what the largest
    takes beside their inputs and outputs; they must run on one stream. More than `max_rows` inputs
    keep a GPU busy by themselves and are not captured. `enabled`: None for on CUDA, False for
    never. What cannot be captured (an op that copies from the host, too little memory) is run
    plainly from then on, with one warning.
    """

    capture = CudaGraph

    def __init__(self, *, max_graphs: int = 8, max_rows: int = 16_384) -> None:
        self.enabled: bool | None = None
        self.max_rows = max_rows
        self._graphs, self._seen = Lru(max_graphs), Lru(64)
        self._pool = None

    def find(
        self, key: Hashable, body: Callable[[Tensor], Tensor], inputs: Tensor
    ) -> Callable[[Tensor], Tensor] | None:
        """The graph to call with `inputs` in place of `body`, if there is one.

        There is none for a caller who captures a graph: it takes the plain call in.
        """
        if inputs.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        enabled = inputs.is_cuda if self.enabled is None else self.enabled
        if not enabled or len(inputs) > self.max_rows:
            return None
        graph = self._graphs.get(key)  # False: it could not be captured
        if graph is None and self._seen.get(key):
            graph = self._captured(body, inputs)
            self._graphs.put(key, graph)
        self._seen.put(key, True)
        return graph or None

    def clear(self) -> None:
        self._graphs.clear()
        self._seen.clear()
        self._pool = None  # a pool whose graphs are gone takes no new ones

    def _captured(
        self, body: Callable[[Tensor], Tensor], inputs: Tensor
    ) -> Callable[[Tensor], Tensor] | bool:
        if self._pool is None and inputs.is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            return self.capture(body, inputs, self._pool)
        except RuntimeError as error:
            warnings.warn(f"the vision tower runs without a CUDA graph: {error}", stacklevel=2)
            self._pool = None
            return False
