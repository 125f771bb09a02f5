"""One node of a prefix plan, on the host; free of torch, because the scheduler builds these."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PlanNode:
    """A node's pages, tokens and query rows [row_start, row_end); see prefix_plan.py."""

    pages: Sequence[int]  # page ids
    kv_len: int  # tokens, those written in this step included
    row_start: int
    row_end: int
    num_new: int = 0  # tokens written into the node in this step: its first rows
