"""CUDA graphs of the vision tower, for batches of views whose grids recur.

With few views the tower is hundreds of short launches, and the host may be slower than the GPU; a
graph is one launch. It holds the addresses of weights, tables and buffers, so a change of weights
must clear the graphs (`VisionTower.prepare` does).
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
    """`body`, captured once. A call copies new inputs in, replays, and returns the same output
    tensor, overwritten."""

    def __init__(
        self, body: Callable[[Tensor], Tensor], inputs: Tensor, pool: "Pool | None"
    ) -> None:
        self._inputs = inputs.clone()
        self._graph = CudaGraph(lambda: body(self._inputs), inputs.device, pool)

    def __call__(self, inputs: Tensor) -> Tensor:
        self._inputs.copy_(inputs)
        return self._graph.replay()


class Graphs:
    """Graphs by key, each captured when its key occurs for the second time.

    The `max_graphs` most recently used are kept, in one memory pool: beyond their inputs and
    outputs, they take together what the largest takes. They must run on one stream. Batches of more
    than `max_rows` input rows keep a GPU busy by themselves and are not captured. `enabled`: None
    for on CUDA with Triton impls, False for never. If a capture fails (too little memory), no
    further key is captured; each of them warns once and runs without a graph.
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
        """The graph to call with `inputs` instead of `body`, whose ops run as `impls`; None if
        there is none.

        While the caller is capturing a graph itself, there is none: it captures the plain call.
        """
        if inputs.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        in_triton = inputs.is_cuda and {*impls} <= {None, "triton"}
        enabled = in_triton if self.enabled is None else self.enabled
        if not enabled or len(inputs) > self.max_rows:
            return None
        graph = self._graphs.get(key)  # False: its capture failed
        if graph is None and self._seen.get(key):
            graph = self._captured(body, inputs)
            self._graphs.put(key, graph)
        self._seen.put(key, True)
        return graph or None

    def clear(self) -> None:
        self._graphs.clear()
        self._seen.clear()
        self._pool = None  # a pool whose graphs have been deleted takes no new ones

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
