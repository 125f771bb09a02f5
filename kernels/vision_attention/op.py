"""Bidirectional attention inside each image view, with axial 2-D rotary on Q and K.

    out = softmax(rotate(Q) rotate(K)^T / sqrt(D)) V        within each view

The first half of a head's D elements rotates with the token's column, the second with its row.
Within a half, the adjacent pair (2i, 2i + 1) rotates by position * theta^(-2i / (D/2)), i < D/4
(the PE-lang tower, as in vLLM's `step_vl.py` and transformers' `step3p7`). Views of different grids
are packed in one batch, one after the other, with tokens in row-major order.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.runtime.dispatch import check, operators, pick
from kernels.runtime.grids import Grid, sides_of, tokens_of
from kernels.runtime.tensor_cache import cached_tensors
from kernels.vision_attention.launch import launch


def vision_attention(
    qkv: Tensor, grids: Sequence[Grid], *, heads: int, theta: float = 1e4, impl: str | None = None
) -> Tensor:
    """Attention of packed views: qkv [T, 3 * H * D] (all of Q, then K, then V) -> [T, H * D].

    `grids` gives each view's (rows, columns); T is the sum of their products. D is a multiple of 4.
    Angles, softmax and sums are fp32; rotated Q and K and the result have qkv's dtype.
    Raises ValueError for shapes that do not fit together.
    """
    if torch.compiler.is_compiling():
        return operators().vision_attention(qkv, sides_of(grids), heads, theta, impl)
    tokens = tokens_of(grids)
    check(heads > 0, f"heads must be 1 or more, not {heads}")
    check(
        qkv.ndim == 2 and qkv.shape[1] > 0 and qkv.shape[1] % (12 * heads) == 0,
        f"qkv must be [T, 3 * {heads} * D], D a multiple of 4",
    )
    check(
        qkv.shape[0] == tokens,
        f"qkv must have one row per token of the grids: {tokens}, not {qkv.shape[0]}",
    )
    return pick("vision_attention", impl, qkv.device, _FORMS)(qkv, grids, heads, theta)


def vision_attention_ref(qkv: Tensor, grids: Sequence[Grid], heads: int, theta: float) -> Tensor:
    """The definition: one view at a time, with explicit scores."""
    outs = []
    for view, (rows, columns) in zip(qkv.split([r * c for r, c in grids]), grids, strict=True):
        q, k, v = _rotated(view[None], rows, columns, heads, theta)
        scores = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
        outs.append((scores.softmax(dim=-1) @ v.float())[0].transpose(0, 1).flatten(1))
    return torch.cat(outs).to(qkv.dtype) if outs else qkv[:, : qkv.shape[1] // 3]


def vision_attention_portable(
    qkv: Tensor, grids: Sequence[Grid], heads: int, theta: float
) -> Tensor:
    """Batches of neighbouring views with equal grids through scaled_dot_product_attention."""
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    start = 0
    for (rows, columns), same in groupby(grids):
        n, tokens = len(list(same)), rows * columns
        end = start + n * tokens
        q, k, v = _rotated(qkv[start:end].view(n, tokens, -1), rows, columns, heads, theta)
        result = F.scaled_dot_product_attention(q, k, v)  # [n, H, tokens, D]
        out[start:end] = result.transpose(1, 2).reshape(n * tokens, -1)
        start = end
    return out


def _rotated(
    qkv: Tensor, rows: int, columns: int, heads: int, theta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """[n, tokens, 3 * H * D] -> rotated Q, rotated K, V, each [n, H, tokens, D]."""
    n, tokens, _ = qkv.shape
    q, k, v = qkv.view(n, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    cos, sin = axial_rotary(rows, columns, q.shape[-1], theta, qkv.device)

    def rotate(x: Tensor) -> Tensor:
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)

    return rotate(q), rotate(k), v


def vision_attention_triton(qkv: Tensor, grids: Sequence[Grid], heads: int, theta: float) -> Tensor:
    """All views in two launches."""
    side = max((max(grid) for grid in grids), default=0)
    cos, sin = axis_rotary(side, qkv.shape[1] // (3 * heads), theta, qkv.device)
    return launch(qkv, grids, heads, cos, sin)


_FORMS = {
    "eager": vision_attention_ref,
    "portable": vision_attention_portable,
    "triton": vision_attention_triton,
}


@cached_tensors(maxsize=16)
def axial_rotary(
    rows: int, columns: int, head_dim: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin of each token's and pair's angle, fp32 [rows * columns, head_dim / 2]."""
    row, column = torch.meshgrid(
        torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij"
    )
    table = axis_rotary(max(rows, columns), head_dim, theta, device)
    cos, sin = (torch.cat([x[column.flatten()], x[row.flatten()]], dim=-1) for x in table)
    return cos, sin


@cached_tensors(maxsize=16)
def axis_rotary(
    side: int, head_dim: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency along one axis, fp32 [side, head_dim / 4]."""
    pair = torch.arange(head_dim // 4, device=device).float()
    position = torch.arange(side, device=device).float()
    angle = position[:, None] * theta ** (-2 * pair / (head_dim // 2))
    return angle.cos(), angle.sin()
