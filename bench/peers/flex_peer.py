"""torch's flex_attention over one packed sequence of all nodes' tokens.

The block mask says which rows see which node, so that this peer reads a shared prefix once, too.
Neither the mask nor the packing of K and V is timed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.peers.compile_peer import for_every_shape
from bench.peers.peer import Unavailable
from kernels.prefix_plan import PrefixPlan


def flex(inputs: dict, *, compiled: bool = True) -> Callable[[], Tensor]:
    """prefix_attention by flex_attention, which without `compiled` holds all scores in memory."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, plan = inputs["q"], inputs["plan"]
    k, v = (x.transpose(0, 1)[None] for x in packed(inputs))  # [1, Hkv, tokens, D]
    seen = _mask(plan, inputs["window"], q.device)
    mask = create_block_mask(seen, None, None, len(q), k.shape[2], device=q.device)
    attend = torch.compile(flex_attention) if compiled else flex_attention
    options = {"block_mask": mask, "scale": inputs["scale"], "enable_gqa": True}
    query = q.transpose(0, 1)[None]  # [1, Hq, T, D]
    with for_every_shape():
        attend(query, k, v, **options)
    return lambda: attend(query, k, v, **options)[0].transpose(0, 1)


def packed(inputs: dict) -> tuple[Tensor, Tensor]:
    """K and V of all tokens, node after node: [tokens, Hkv, D]."""
    kv, plan, device = inputs["pages"], inputs["plan"], inputs["q"].device
    if kv.k.dtype != inputs["q"].dtype:
        raise Unavailable("takes K and V of q's dtype only")
    pages, places = [], []
    for node in plan.nodes:
        token = torch.arange(node.kv_len)
        pages.append(torch.tensor(node.pages, dtype=torch.long)[token // plan.page_size])
        places.append(token % plan.page_size)
    page, place = torch.cat(pages).to(device), torch.cat(places).to(device)
    return kv.k[page, :, place], kv.v[page, :, place]


def _mask(plan: PrefixPlan, window: int, device: torch.device) -> Callable:
    """Token t is seen by the rows from first[t] to last[t], those of its node that come behind."""
    first, last, position = [], [], []
    for node, start in zip(plan.nodes, plan.node_starts, strict=True):
        token = torch.arange(node.kv_len)
        own = (token - (node.kv_len - node.num_new)).clamp(min=0)
        first.append(node.row_start + own)
        last.append(torch.full_like(token, node.row_end))
        position.append(start + token)
    first, last, position = (torch.cat(x).to(device) for x in (first, last, position))
    oldest = plan.row_position.to(device) - (window - 1 if window else 2**30)

    def seen(batch: Tensor, head: Tensor, row: Tensor, token: Tensor) -> Tensor:
        return (row >= first[token]) & (row < last[token]) & (position[token] >= oldest[row])

    return seen
