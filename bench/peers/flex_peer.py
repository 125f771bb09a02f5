"""torch's flex_attention over one packed sequence of all nodes' tokens.

The block mask says which rows see which node, so this peer also reads a shared prefix only once.
Neither building the mask nor packing K and V is timed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.peers.compile_peer import for_every_shape
from bench.peers.peer import Unavailable
from kernels.prefix_plan import PrefixPlan


def flex(inputs: dict, *, compiled: bool = True) -> Callable[[], Tensor]:
    """prefix_attention by flex_attention; if not `compiled`, it stores all scores."""
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
        raise Unavailable("supports K and V only in q's dtype")
    pages, offsets = [], []
    for node in plan.nodes:
        token = torch.arange(node.kv_len)
        pages.append(torch.tensor(node.pages, dtype=torch.long)[token // plan.page_size])
        offsets.append(token % plan.page_size)
    page, offset = torch.cat(pages).to(device), torch.cat(offsets).to(device)
    return kv.k[page, :, offset], kv.v[page, :, offset]


def _mask(plan: PrefixPlan, window: int, device: torch.device) -> Callable:
    """The mask function: token t is seen by rows first[t] to last[t] - 1 of its node, which are all
    rows of the node or, for a new token, those from its own row on."""
    firsts, lasts, positions = [], [], []
    for node, start in zip(plan.nodes, plan.node_starts, strict=True):
        token = torch.arange(node.kv_len)
        new_index = (token - (node.kv_len - node.num_new)).clamp(min=0)
        firsts.append(node.row_start + new_index)
        lasts.append(torch.full_like(token, node.row_end))
        positions.append(start + token)
    first, last, position = (torch.cat(x).to(device) for x in (firsts, lasts, positions))
    oldest = plan.row_position.to(device) - (window - 1 if window else 2**30)

    def seen(batch: Tensor, head: Tensor, row: Tensor, token: Tensor) -> Tensor:
        return (row >= first[token]) & (row < last[token]) & (position[token] >= oldest[row])

    return seen
