"""CUDA graphs of decode steps, one for each number of rows: the host launches a whole step at once.

A graph is captured over a padded plan (kernels/prefix_plan.py) and contains the whole decode step
(decode_step.py). When rollouts start, end or need a new page, the host refills the plan in place,
without waiting for the GPU. Padding rows write to a scratch page, and their tokens are unused.
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
    sampling_key,
)
from pacore_sched.sched.request import Sampling
from pacore_sched.sched.step_batch import StepBatch

if TYPE_CHECKING:
    from model.cuda_graph import Pool

MIN_LEVELS = 3  # nodes per path that every graph has room for: images, prompt, rollout


def default_buckets(max_running: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then multiples of 8 up to the first that holds `max_running`."""
    last = cdiv(max_running, 8) * 8
    return (*(rows for rows in (1, 2, 4) if rows < max_running), *range(8, last + 1, 8))


def node_row_limits(rows: int, group: int) -> list[int]:
    """The node sizes, in rows, for which graphs of `rows` rows are captured: the rows that fit
    attention's tiles of 16 and 64 query vectors (`group` vectors per row), where fewer than `rows`;
    and `rows`.
    """
    limits = [vectors // group for vectors in (16, 64)]
    return [*(limit for limit in limits if 0 < limit < rows), rows]


class Captured(Protocol):
    """The interface of a captured step."""

    def replay(self) -> Tensor: ...


Capture = Callable[[Callable[[], Tensor], torch.device, "Pool | None"], Captured]


class DecodeGraph:
    """One captured step: fill it with up to `capacity.rows` rollouts, then replay it."""

    def __init__(
        self,
        model: Step3VL,
        cache: KVCache,
        last_tokens: LastTokens,
        capacity: Capacity,
        sampling_key: SamplingKey,
        capture: Capture,
        pool: "Pool | None",
    ) -> None:
        self.capacity = capacity
        device, rows = model.device, capacity.rows
        self._scratch, self._padding_index = cache.num_pages - 1, last_tokens.padding_index
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
        tensors = self._rows.tensors
        self._fill_rows((), (), (), ())
        self._last = last_tokens.tokens
        step = DecodeStep(
            Step(tensors["positions"], tensors["slots"], self._plan),
            tensors["batch_indices"],
            tensors["seeds"],
            self._ids,
            RowSampler(((sampling_key, None),)),
            advances=True,
        )
        # All rows are padding during capture, so its warm-up run changes nothing that matters.
        self._graph = capture(lambda: step.run(model, cache, last_tokens), device, pool)

    def fill(self, step: StepBatch, batch_indices: Sequence[int], seeds: Sequence[int]) -> int:
        """Load a decode step; `batch_indices` are its rows' entries in LastTokens.

        Returns how many times `replay` may be called before pages are full.
        """
        rows = len(batch_indices)
        self._plan.refill([*step.plan_nodes, *self.capacity.padding(rows, self._scratch)])
        self._fill_rows(step.positions, step.slots, batch_indices, seeds)
        torch.index_select(self._last, 0, self._rows.tensors["batch_indices"], out=self._ids)
        return self._plan.steps_left + 1

    def replay(self) -> Tensor:
        """The next step's results [2, capacity.rows], in memory that the following step reuses."""
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
    """Graphs by number of rows, tree shape and sampling key, each captured at first use.

    They share a memory pool and must be replayed on one stream. `enabled`: None to use graphs where
    the model's impls allow capture (`capturable`), False for never. If a capture fails all the same
    (too little memory), steps run without graphs from then on, with one warning. `len` is the
    number of captured graphs.
    """

    capture: Capture = CudaGraph

    def __init__(
        self, model: Step3VL, cache: KVCache, last_tokens: LastTokens, buckets: Sequence[int]
    ) -> None:
        self.enabled: bool | None = None
        self.buckets = sorted(buckets)
        self._graph_args = model, cache, last_tokens
        self._graphs = Lru(64)
        self._pool: Pool | None = None
        config = model.config.decoder
        self._group = config.heads // config.kv_heads

    def __len__(self) -> int:
        return len(self._graphs)

    def find(self, step: StepBatch, samplings: Sequence[Sampling]) -> DecodeGraph | None:
        """The graph for a decode step, or None; `samplings` has one entry for each row."""
        model = self._graph_args[0]
        enabled = capturable(model) if self.enabled is None else self.enabled
        mixed = len(set(map(sampling_key, samplings))) > 1
        if not enabled or mixed or len(step.positions) > self.buckets[-1]:
            return None
        # Few requests ask for alternatives, and each mix of their numbers would be another graph,
        # with workspaces of several bytes per logit.
        if any(sampling.top_logprobs for sampling in samplings):
            return None
        capacity, sampling = self._capacity(step), sampling_key(samplings[0])
        key = (capacity, sampling, *sorted(model.impl.items()))
        graph = self._graphs.get(key)
        return graph or self._add_graph(key, capacity, sampling)

    def clear(self) -> None:
        """Drop all graphs, as needed after loading new weights."""
        self._graphs.clear()
        self._pool = None  # a pool whose graphs have been freed takes no new ones

    def _capacity(self, step: StepBatch) -> Capacity:
        """The smallest bucket that fits, with the row limit that fits the largest node."""
        rows = next(bucket for bucket in self.buckets if bucket >= len(step.positions))
        largest = max(node.row_end - node.row_start for node in step.plan_nodes)
        row_limit = next(limit for limit in node_row_limits(rows, self._group) if largest <= limit)
        return Capacity(rows, row_limit, max(MIN_LEVELS, _depth(step)))

    def _add_graph(
        self, key: Hashable, capacity: Capacity, sampling_key: SamplingKey
    ) -> DecodeGraph | None:
        if self._pool is None and self._graph_args[0].device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        try:
            graph = DecodeGraph(*self._graph_args, capacity, sampling_key, self.capture, self._pool)
        except RuntimeError as error:
            warnings.warn(f"decode steps run without CUDA graphs: {error}", stacklevel=2)
            self.enabled = False
            self.clear()
            return None
        self._graphs.put(key, graph)
        return graph


def _depth(step: StepBatch) -> int:
    """The most nodes on a path; nodes are listed parents first."""
    ends: list[int] = []
    levels = 0
    for node in step.plan_nodes:
        while ends and ends[-1] <= node.row_start:
            ends.pop()
        ends.append(node.row_end)
        levels = max(levels, len(ends))
    return levels
