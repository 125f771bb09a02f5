"""Attention over a prefix tree of paged KV: each page is read once for all rows that see it.

op            the op, its definition in eager PyTorch, and its portable form
launch        the launcher of the Triton form
configs       kernel configs: input classes, the rule, candidates for tuning
schedule      divides a plan's work evenly over CTAs, on the device
pieces        writes each CTA's pieces down, once per step for all layers
records       columns of the tables that schedule and pieces write and the kernels read
kernel        the attention kernel: a persistent loop over pieces
row_tile      one piece: online softmax of a row tile over a node's tokens
fused_decode  decode straight from the QKV projection
merge         the second kernel: log-sum-exp merge of partials
check         a debug check of the schedule
advance       moves a decode step's plan on by one token, on the device
"""

from kernels.prefix_attention.op import check_attention, prefix_attention, prefix_attention_ref

__all__ = ["check_attention", "prefix_attention", "prefix_attention_ref"]
