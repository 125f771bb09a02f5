"""CUDA graphs of the vision tower, for batches of views whose grids return.

Of few views the tower is hundreds of short launches, and the host may be slower than the GPU; a
graph is one launch. Captured with it are the addresses of weights, tables and buffers: whoever
changes weights clears the graphs (`VisionTower.prepare` does).
"""

import warnings
from collections.abc import Callable, Collection, Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.runtime.lru import Lru
from model.cuda_graph import CudaGraph

if TYPE_CHECKING:
    from model.cuda_graph import Pool


class GraphOfInputs:
    """`body` captured once; called with new inputs, it replays and returns its reused output."""

    def __init__(
        self, body: Callable[[Tensor], Tensor], inputs: Tensor, pool: "Pool | None"
    ) -> None:
        self._inputs = inputs.clone()
        self._graph = CudaGraph(lambda: body(self._inputs), inputs.device, pool)

    def __call__(self, inputs: Tensor) -> Tensor:
        self._inputs.copy_(inputs)
        return self._graph.replay()


class Graphs:
    """Graphs by key, each captured when its key comes a second time.

    At most `max_graphs`, those used last, in one memory pool, so that they take what the largest
    takes beside their inputs and outputs; they must run on one stream. More than `max_rows` inputs
    keep a GPU busy by themselves and are not captured. `enabled`: None for on CUDA in Triton forms,
    False for never. What cannot be captured after all (too little memory) is run plainly from then
    on, with one warning.
    """

    capture = GraphOfInputs

    def __init__(self, *, max_graphs: int = 8, max_rows: int = 16_384) -> None:
        self.enabled: bool | None = None
        self.max_rows = max_rows
        self._graphs, self._seen = Lru(max_graphs), Lru(64)
        self._pool: Pool | None = None

    def find(
        self,
        key: Hashable,
        body: Callable[[Tensor], Tensor],
        inputs: Tensor,
        impls: Collection[str | None],
    ) -> Callable[[Tensor], Tensor] | None:
        """The graph to call with `inputs` in place of `body`, whose ops run in the forms `impls`,
        if there is one.

        There is none for a caller who captures a graph: it takes the plain call in.
        """
        if inputs.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        in_triton = inputs.is_cuda and {*impls} <= {None, "triton"}
        enabled = in_triton if self.enabled is None else self.enabled
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
