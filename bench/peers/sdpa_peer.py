"""torch's scaled_dot_product_attention over KV that is gathered within the timed call.

It uses the backend that torch chooses, or a given one. The memory-efficient backend does not
support query heads that share KV heads, so it is not a peer of prefix attention.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers.peer import Unavailable
from kernels.plan_node import PlanNode
from kernels.prefix_plan import PrefixPlan


def sdpa(inputs: dict, *, backend: str | None = None) -> Callable[[], Tensor]:
    """prefix_attention by gathering the tokens of all sequences into one padded call of
    scaled_dot_product_attention, with a mask only if sequences differ or rows are causal.

    `backend`: see `only`.
    """
    q, pages, plan = inputs["q"], inputs["pages"], inputs["plan"]
    if pages.k.dtype != q.dtype:
        raise Unavailable("supports K and V only in q's dtype")
    rows, slots, mask = _padded(plan, pages.kv_heads, q.device, inputs["window"])
    options = {"scale": inputs["scale"], "enable_gqa": True, **_masking(mask)}
    flat_k, flat_v = pages.k.view(-1, q.shape[2]), pages.v.view(-1, q.shape[2])

    def call() -> Tensor:
        # [sequences, heads, rows or tokens, head_dim]
        query = q[rows].transpose(1, 2)
        k, v = (
            torch.index_select(flat, 0, slots.view(-1)).view(*slots.shape, -1)
            for flat in (flat_k, flat_v)
        )
        with only(backend) if backend else nullcontext():
            result = F.scaled_dot_product_attention(query, k, v, **options)
        out = torch.zeros_like(q)
        out[rows] = result.transpose(1, 2)
        return out

    return call


@contextmanager
def only(backend: str) -> Iterator[None]:
    """Use only one backend of torch.nn.attention.SDPBackend; Unavailable if it has no kernel."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        try:
            yield
        except RuntimeError as error:
            if "No available kernel" in str(error) or "No viable backend" in str(error):
                reason = "torch has no such kernel for this device, dtype, mask or these heads"
                raise Unavailable(reason) from None
            raise


def _masking(mask: Tensor) -> dict:
    """The cheapest SDPA arguments for a mask, bool [n, m, tokens]."""
    if bool(mask.all()):
        return {}
    if mask.shape[1] == mask.shape[2] and bool((mask == torch.ones_like(mask[0]).tril()).all()):
        return {"is_causal": True}
    return {"attn_mask": mask[:, None]}


def _padded(
    plan: PrefixPlan, kv_heads: int, device: torch.device, window: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows and token slots of each sequence, padded to the longest sequence.

    Returns rows [n, m], padded by repeating the last row; slots [n, kv_heads, tokens] in the pages
    viewed as rows of head_dim; and the mask of tokens that each row sees, bool [n, m, tokens].
    """
    sequences = plan.sequences
    width = max(end - start for start, end, _ in sequences)
    length = max(sum(node.kv_len for node in path) for _, _, path in sequences)
    rows, slots, masks = [], [], []
    for start, end, path in sequences:
        row = torch.arange(start, start + width).clamp_max(end - 1)
        slot = torch.cat([_slots(node, plan.page_size, kv_heads) for node in path], dim=1)
        sees = torch.cat([_sees(node, row) for node in path], dim=1)
        if window:  # the last tokens that a row sees
            sees &= sees.flip(1).cumsum(1).flip(1) <= window
        rows.append(row)
        padding = (0, length - slot.shape[1])
        slots.append(F.pad(slot[None], padding, mode="replicate")[0] if padding[1] else slot)
        masks.append(F.pad(sees, padding))
    return (
        torch.stack(rows).to(device),
        torch.stack(slots).to(device),
        torch.stack(masks).to(device),
    )


def _slots(node: PlanNode, page_size: int, kv_heads: int) -> Tensor:
    """The slots of the node's tokens for each KV head: [kv_heads, kv_len]."""
    token = torch.arange(node.kv_len)
    page = torch.tensor(node.pages)[token // page_size]
    head = torch.arange(kv_heads)[:, None]
    return (page * kv_heads + head) * page_size + token % page_size


def _sees(node: PlanNode, row: Tensor) -> Tensor:
    """The mask of the node's tokens that each row sees: bool [rows, kv_len]."""
    visible = node.kv_len - node.num_new + row - node.row_start + 1
    return torch.arange(node.kv_len) < visible[:, None]
