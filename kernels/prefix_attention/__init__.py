"""Attention over a prefix tree of KV pages: every page is read once for all rows that see it.

op            the op, its definition in eager PyTorch, its portable form
launch        the launcher of the Triton form, and tiles: its tile choices
schedule      a plan's work in equal shares for the programs; pieces: each program's, written down;
              records: the columns of both
kernel        the attention kernel; row_tile: what it does of one tile of rows; fused_decode: the
              same straight from the QKV projection
merge         the second kernel: partial results into one
check         a debug check of what the schedule says
advance       a decode step's plan moved on by one token, on the device
"""

from kernels.prefix_attention.op import check_attention, prefix_attention, prefix_attention_ref

__all__ = ["check_attention", "prefix_attention", "prefix_attention_ref"]
