"""A node of a prefix plan, on the host. No torch: the scheduler lays its tree out in these."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PlanNode:
    """Page ids, tokens held, rows [row_start, row_end), new tokens (see prefix_plan.py)."""

    pages: Sequence[int]
    kv_len: int
    row_start: int
    row_end: int
    num_new: int = 0  # tokens of this step written into the node: its first rows
