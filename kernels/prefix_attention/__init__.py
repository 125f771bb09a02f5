"""Attention over a prefix tree of KV pages: every page is read once for all rows that see it.

op            the op, its definition in eager PyTorch, its portable form
launch        the launcher of the Triton form; schedule, which cuts a plan's work among programs
kernel        the Triton kernels: row_tile and fused_decode are their parts, merge the second
tiles         tile choices
advance       moves a decode step's plan on by a token, on the device
"""

from kernels.prefix_attention.op import (
    check_attention,
    prefix_attention,
    prefix_attention_portable,
    prefix_attention_ref,
)

__all__ = [
    "check_attention",
    "prefix_attention",
    "prefix_attention_portable",
    "prefix_attention_ref",
]
