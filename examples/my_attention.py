"""A kernel of your own in the op table: checked like every form, timed in turns with all others.

Run it with `.venv/bin/python examples/my_attention.py`, which is the same as

    python -m bench ops --op prefix_attention --shape "B16 P2048 S128" --with my_attention.py:attend
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.__main__ import main
from kernels.kv_pages import KVPages
from kernels.prefix_plan import PrefixPlan


def attend(
    q: Tensor, pages: KVPages, plan: PrefixPlan, scale: float, window: int, return_lse: bool
) -> Tensor:
    """Launch your kernel here; a loop over sequences stands in for it. Arguments and result are
    those of kernels.prefix_attention.prefix_attention."""
    assert plan.is_decode and not window and not return_lse
    out = torch.zeros_like(q)  # [rows, heads, head_dim]
    for row, _, path in plan.sequences:
        tokens = [(node.pages, torch.arange(node.kv_len)) for node in path]
        page = torch.cat([torch.tensor(ids)[t // plan.page_size] for ids, t in tokens])
        offset = torch.cat([t % plan.page_size for _, t in tokens])
        k, v = (x[page, :, offset].transpose(0, 1) for x in pages[:2])  # [Hkv, tokens, dim]
        query = q[row, :, None]  # [heads, 1, head_dim]
        out[row] = F.scaled_dot_product_attention(query, k, v, scale=scale, enable_gqa=True)[:, 0]
    return out


if __name__ == "__main__":
    command = ["ops", "--op", "prefix_attention", "--shape", "B16 P2048 S128"]
    raise SystemExit(main([*command, "--with", f"{__file__}:attend"]))
