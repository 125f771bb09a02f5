"""torch's flex_attention over one packed sequence of all nodes' tokens.

The block mask says which rows see which node, so that this peer reads a shared prefix once, too.
Neither the mask nor the packing of K and V is timed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.peers.layout import Unavailable
from kernels.prefix_plan import PrefixPlan


def flex(inputs: dict, *, compiled: bool = True) -> Callable[[], Tensor]:
    """prefix_attention by flex_attention, which without `compiled` holds all scores in memory."""
    from torch._dynamo import config as dynamo  # these two bring half of torch's compiler
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, plan = inputs["q"], inputs["plan"]
    if inputs["k_pages"].dtype != q.dtype:
        raise Unavailable("takes K and V of q's dtype only")
    pages, places = _tokens(plan)
    k, v = (
        inputs[name][pages.to(q.device), :, places.to(q.device)].transpose(0, 1)[None]
        for name in ("k_pages", "v_pages")
    )  # [1, Hkv, tokens, D]
    mask = create_block_mask(
        _mask(plan, inputs["window"], q.device), None, None, len(q), len(pages), device=q.device
    )
    attend = torch.compile(flex_attention) if compiled else flex_attention
    options = {"block_mask": mask, "scale": inputs["scale"], "enable_gqa": True}
    query = q.transpose(0, 1)[None]  # [1, Hq, T, D]
    # Past the limit dynamo would run the slow form without a word.
    with dynamo.patch(recompile_limit=1024, fail_on_recompile_limit_hit=True):
        attend(query, k, v, **options)
    return lambda: attend(query, k, v, **options)[0].transpose(0, 1)


def _tokens(plan: PrefixPlan) -> tuple[Tensor, Tensor]:
    """Page and place within it of every token, node after node."""
    pages, places = [], []
    for node in plan.nodes:
        token = torch.arange(node.kv_len)
        pages.append(torch.tensor(node.pages, dtype=torch.long)[token // plan.page_size])
        places.append(token % plan.page_size)
    return torch.cat(pages), torch.cat(places)


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
