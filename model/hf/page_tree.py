"""The pages of a batch of sequences that share prompts, and the prefix plan of each step.

The sequences have equally many tokens and form a tree of levels. All nodes of a level are equally
long, and each has equally many children. A prompt read once and continued sixteen times is a level
of one node and a level of sixteen.
"""

from dataclasses import dataclass

import numpy as np
import torch

from kernels.plan_node import PlanNode
from kernels.prefix_plan import PrefixPlan
from kernels.runtime.arithmetic import cdiv
from kernels.runtime.staging import on_device
from model.decoder import Step


@dataclass
class _Level:
    """pages: the page ids of each node; tokens: of each node"""

    pages: list[list[int]]
    tokens: int = 0


class PageTree:
    """num_pages: the size of the pool, which grows as pages are needed

    advances: whether a plan of a decode step may be advanced on the device instead of rebuilt;
        False for impl "eager", which reads the plan's nodes on the host
    """

    def __init__(self, page_size: int, device: torch.device, advances: bool) -> None:
        self.page_size, self.device, self.advances = page_size, device, advances
        self.num_pages = 0
        self.clear()

    def clear(self) -> None:
        """Remove all sequences; the pool keeps its size."""
        self._levels: list[_Level] = []
        self._used = 0
        self._step: Step | None = None

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return sum(level.tokens for level in self._levels)

    @property
    def sequences(self) -> int:
        """The number of sequences; 0 before the first step."""
        return len(self._levels[-1].pages) if self._levels else 0

    def fork(self, count: int) -> None:
        """Continue every sequence `count` times; what it has so far is shared."""
        if not self._levels or count == 1:
            return
        sequences = count * self.sequences
        if not self._levels[-1].tokens:
            self._levels.pop()
        self._levels.append(_Level([[] for _ in range(sequences)]))
        self._step = None

    @property
    def step(self) -> Step:
        """The step that `append` made last."""
        if self._step is None:
            raise ValueError("a step begins at layer 0")
        return self._step

    def append(self, sequences: int, tokens: int) -> None:
        """Begin the step that writes `tokens` tokens to each sequence; its rows are [sequences,
        tokens]. Raises ValueError for a different number of sequences than in earlier steps."""
        if not self._levels:
            self._levels.append(_Level([[] for _ in range(sequences)]))
        if sequences != self.sequences:
            raise ValueError(
                f"the cache has {self.sequences} sequences, the input has {sequences} rows:"
                " batch_repeat_interleave(n) continues each of them n times"
            )
        self._levels[-1].tokens += tokens
        plan = self._step.plan if self._step and self.advances and tokens == 1 else None
        if plan is not None and plan.is_decode and plan.advanced < plan.steps_left:
            self.step.advance()
        else:
            self._reserve()
            self._step = self._new_step(tokens)

    def _reserve(self) -> None:
        """Give the last level's nodes the pages that their tokens need."""
        leaves = self._levels[-1]
        for pages in leaves.pages:
            end = self._used + cdiv(leaves.tokens, self.page_size) - len(pages)
            pages.extend(range(self._used, end))
            self._used = end
        if self._used > self.num_pages:  # by a quarter at least: a larger pool is a copy
            self.num_pages = max(self._used, self.num_pages * 5 // 4)

    def _new_step(self, tokens: int) -> Step:
        leaves, size = self._levels[-1], self.page_size
        num_rows = self.sequences * tokens
        nodes = [
            PlanNode(
                tuple(pages),
                level.tokens,
                index * num_rows // len(level.pages),
                (index + 1) * num_rows // len(level.pages),
                num_new=tokens if level is leaves else 0,
            )
            for level in self._levels
            for index, pages in enumerate(level.pages)
        ]
        plan = PrefixPlan.build(
            sorted(nodes, key=lambda node: node.row_start),  # a parent stays before its child
            num_rows=num_rows,
            num_pages=self.num_pages,
            page_size=size,
            device=self.device,
        )
        offset = np.arange(leaves.tokens - tokens, leaves.tokens)
        slots = np.array(leaves.pages)[:, offset // size] * size + offset % size
        positions = np.tile(self.length - leaves.tokens + offset, self.sequences)
        device = self.device
        return Step(on_device(positions, device), on_device(slots.flatten(), device), plan)
