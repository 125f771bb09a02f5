"""CUDA graphs of decode steps, by how many rows they have: a step is one launch for the host.

A graph is captured over a padded plan (kernels/prefix_plan.py) and holds all of a decode step
(decode_step.py). When rollouts come, go or turn a page, the host fills the plan anew, in place and
without waiting for the GPU. Padding rows write to a scratch page and draw tokens nobody reads.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from kernels.prefix_plan import Capacity, PrefixPlan
from kernels.runtime.arithmetic import cdiv
from kernels.runtime.lru import Lru
from kernels.runtime.staging import Packed
from model.cuda_graph import CudaGraph
from model.decoder import Step
from model.kv_cache import KVCache
from model.step3vl import Step3VL
from pacore_sched.engine.decode_step import (
    DecodeStep,
    LastTokens,
    RowSampler,
    SamplingKey,
    capturable,
)
from pacore_sched.sched.step_batch import StepBatch

if TYPE_CHECKING:
    from model.cuda_graph import Pool

MIN_LEVELS = 3  # nodes on a path that there is always room for: images, prompt, rollout


def default_buckets(max_running: int) -> tuple[int, ...]:
    """1, 2, 4, 8, and from there on in steps of 8."""
    last = cdiv(max_running, 8) * 8
    return (*(rows for rows in (1, 2, 4) if rows < max_running), *range(8, last + 1, 8))


def node_row_limits(rows: int, group: int) -> list[int]:
    """What graphs of `rows` rows allow a node to have: the rows of attention's tiles of 16 and 64
    query vectors, `group` to a row, as far as they are fewer, and all."""
    tiles = [vectors // group for vectors in (16, 64)]
    return [*(tile for tile in tiles if 0 < tile < rows), rows]


class Captured(Protocol):
    """What a captured step can do."""

    def replay(self) -> Tensor: ...


Capture = Callable[[Callable[[], Tensor], torch.device, "Pool | None"], Captured]


class DecodeGraph:
    """One captured step: fill it with up to `capacity.rows` rollouts, then replay it."""

    def __init__(
        self,
        model: Step3VL,
        cache: KVCache,
        tables: LastTokens,
        capacity: Capacity,
        settings: SamplingKey,
        capture: Capture,
        pool: "Pool | None",
    ) -> None:
        self.capacity = capacity
        device, rows = model.device, capacity.rows
        self._scratch, self._padding_index = cache.num_pages - 1, tables.padding_index
        self._page_size = cache.page_size
        self._plan = PrefixPlan.build(
            capacity.padding(0, self._scratch),
            num_rows=rows,
            num_pages=cache.num_pages,
            page_size=cache.page_size,
            device=device,
            capacity=capacity,
        )
        shapes = dict.fromkeys(("positions", "slots", "batch_indices", "seeds"), (rows,))
        self._rows = Packed(shapes, dtype=torch.int64, device=device)
        self._ids = torch.zeros(rows, dtype=torch.int64, device=device)
        of_rows = self._rows.tensors
        self._fill_rows((), (), (), ())
        self._last = tables.last
        step = DecodeStep(
            Step(of_rows["positions"], of_rows["slots"], self._plan),
            of_rows["batch_indices"],
            of_rows["seeds"],
            self._ids,
            RowSampler(((settings, None),)),
            advances=True,
        )
        # Captured while all rows pad: the run before it changes nothing that matters.
        self._graph = capture(lambda: step.run(model, cache, tables), device, pool)

    def fill(self, step: StepBatch, batch_indices: Sequence[int], seeds: Sequence[int]) -> int:
        """Take in a decode step; `batch_indices` are its rows' entries in LastTokens.

        Returns how often `replay` may follow before pages are full.
        """
        rows = len(batch_indices)
        self._plan.refill([*step.plan_nodes, *self.capacity.padding(rows, self._scratch)])
        self._fill_rows(step.positions, step.slots, batch_indices, seeds)
        torch.index_select(self._last, 0, self._rows.tensors["batch_indices"], out=self._ids)
        return self._plan.room + 1

    def replay(self) -> Tensor:
        """The next step's results [2, capacity.rows], in memory that the one after it reuses."""
        return self._graph.replay()

    def _fill_rows(
        self,
        positions: Sequence[int],
        slots: Sequence[int],
        batch_indices: Sequence[int],
        seeds: Sequence[int],
    ) -> None:
        padding = self.capacity.rows - len(batch_indices)
        scratch = [self._scratch * self._page_size] * padding
        self._rows.fill(
            {
                "positions": np.array([*positions, *[0] * padding]),
                "slots": np.array([*slots, *scratch]),
                "batch_indices": np.array([*batch_indices, *[self._padding_index] * padding]),
                "seeds": np.array([*seeds, *[0] * padding], np.int64),
            }
        )


class DecodeGraphs:
    """Graphs by number of rows, tree shape and sampling settings, each captured at first use.

    They share a memory pool and must be replayed on one stream. `enabled`: None for where the
    model's forms can be captured (`capturable`), False for never. If one cannot be captured after
    all (too little memory), steps run plainly from then on, with one warning. `len` is the number
    of graphs captured.
    """

    capture: Capture = CudaGraph

    def __init__(
        self, model: Step3VL, cache: KVCache, tables: LastTokens, buckets: Sequence[int]
    ) -> None:
        self.enabled: bool | None = None
        self.buckets = sorted(buckets)
        self._of = model, cache, tables
        self._graphs = Lru(64)
        self._pool: Pool | None = None
        config = model.config.decoder
        self._group = config.heads // config.kv_heads

    def __len__(self) -> int:
        return len(self._graphs)

    def find(self, step: StepBatch, settings: Sequence[SamplingKey]) -> DecodeGraph | None:
        """The graph for a decode step, `settings` those of each row, if there is one."""
        model = self._of[0]
        enabled = capturable(model) if self.enabled is None else self.enabled
        rows = len(step.positions)
        if not enabled or len(set(settings)) > 1 or rows > self.buckets[-1]:
            return None
        capacity = self._capacity(step)
        key = (capacity, settings[0], *sorted(model.impl.items()))
        graph = self._graphs.get(key)
        return graph or self._captured(key, capacity, settings[0])

    def clear(self) -> None:
        """Drop all graphs: for new weights."""
        self._graphs.clear()
        self._pool = None  # a pool whose graphs are gone takes no new ones

    def _capacity(self, step: StepBatch) -> Capacity:
        """The least bucket, with the row tiles that attention takes for nodes as large as these."""
        rows = next(bucket for bucket in self.buckets if bucket >= len(step.positions))
        most = max(node.row_end - node.row_start for node in step.plan_nodes)
        most = next(tile for tile in node_row_limits(rows, self._group) if most <= tile)
        return Capacity(rows, most, max(MIN_LEVELS, _levels(step)))

    def _captured(
        self, key: Hashable, capacity: Capacity, settings: SamplingKey
    ) -> DecodeGraph | None:
        if self._pool is None and self._of[0].device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        try:
            graph = DecodeGraph(*self._of, capacity, settings, self.capture, self._pool)
        except RuntimeError as error:
            warnings.warn(f"decode steps run without CUDA graphs: {error}", stacklevel=2)
            self.enabled = False
            self.clear()
            return None
        self._graphs.put(key, graph)
        return graph


def _levels(step: StepBatch) -> int:
    """Nodes on a path, at most; nodes stand parents first."""
    ends: list[int] = []
    most = 0
    for node in step.plan_nodes:
        while ends and ends[-1] <= node.row_start:
            ends.pop()
        ends.append(node.row_end)
        most = max(most, len(ends))
    return most
