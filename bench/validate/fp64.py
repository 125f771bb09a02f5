"""fp64 formulas of every op: references that share neither code nor rounding with the ops.

They take the inputs of `bench.cases.numerics_cases`, 16-bit and fp8 ones too, and widen them. Two
quantities stay in fp32, because the ops define them in fp32 and their rounding is no error of a
form: the angle position * inv_freq of qk_norm_rope, whose rounding turns by up to 2^-13 at position
4095, and sample's u, whose rounding shifts the noise of the likeliest tokens by thousandths.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case
from kernels.kv_pages import KVPages
from kernels.prefix_plan import PrefixPlan
from kernels.runtime.arithmetic import cdiv
from kernels.runtime.grids import Grid

Results = tuple[Tensor, ...]
WORD = 2**32


def reference(case: Case, inputs: dict) -> list[Tensor]:
    """The expected results of the case's op, then the pages it should have written.

    In fp64, tokens in int64, on the CPU. `inputs` are not modified.
    """
    wide = {name: _wide(value) for name, value in inputs.items()}
    with torch.inference_mode():
        return list(FORMULAS[case.op](**wide))


def _wide(value: object) -> object:
    def widened(x: Tensor) -> Tensor:
        return x.to("cpu", torch.float64 if x.is_floating_point() else None, copy=True)

    if isinstance(value, KVPages):
        return value.map(widened)
    return widened(value) if isinstance(value, Tensor) else value


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def layer(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis."""
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) / (var + eps).sqrt() * weight + bias


def logistic(x: Tensor) -> Tensor:
    """1 / (1 + e^-x)."""
    return 1 / (1 + (-x).exp())


def rope_half(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """x [T, H, D], elements i and i + D/2 as a complex number, turned by position * inv_freq."""
    angle = (positions[:, None].float() * inv_freq.float()).double()[:, None]
    z = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


def rope_axial(x: Tensor, grid: Grid, theta: float) -> Tensor:
    """x [tokens, H, D] of a view: pairs (2i, 2i + 1), turned by column in the first half of a
    head and by row in the second."""
    token, dim = torch.arange(len(x)), x.shape[-1]
    frequency = theta ** (-4 / dim * torch.arange(dim // 4, dtype=torch.float64))
    positions = torch.stack([token % grid[1], token // grid[1]], 1)  # [tokens, 2]
    angle = (positions[..., None] * frequency).flatten(1)[:, None]  # [tokens, 1, D / 2]
    z = torch.complex(x[..., 0::2], x[..., 1::2]) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(z).flatten(-2)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D] over k, v [tokens, Hkv, D]: out [T, Hq, D] and log-sum-exp [T, Hq].

    seen: bool [T, tokens]; None: every row sees all tokens
    """
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("rkgd,tkd->rkgt", grouped, k) * scale
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("rkgt,tkd->rkgd", weights / total, v)
    return out.flatten(1, 2), (top + total.log())[..., 0].flatten(1)


def convolve(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3x3, stride 2, padding 1, by unfolding: [C, R, S] -> [C', ceil(R / 2), ceil(S / 2)]."""
    patches = F.unfold(image[None], 3, padding=1, stride=2)[0]  # [C * 9, positions]
    result = weight.flatten(1) @ patches + bias[:, None]
    return result.unflatten(1, [cdiv(side, 2) for side in image.shape[1:]])


def downsample(x: Tensor, grid: Grid, *convolutions: tuple[Tensor, Tensor]) -> Tensor:
    """A view's tokens [rows * columns, C] after convolutions, as tokens again."""
    image = x.T.unflatten(1, grid)
    for weight, bias in convolutions:
        image = convolve(image, weight, bias)
    return image.flatten(1).T


def split_views(x: Tensor, grids: Sequence[Grid]) -> Iterator[tuple[Tensor, Grid]]:
    """The tokens of each view, and its grid."""
    return zip(x.split([rows * columns for rows, columns in grids]), grids, strict=True)


def _rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> Results:
    if residual is None:
        return (rms(x, weight, eps),)
    return rms(x + residual, weight, eps), x + residual


def _layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    eps: float,
) -> Results:
    if residual is None:
        return (layer(x, weight, bias, eps),)
    total = residual + (x if gamma is None else gamma * x)
    return layer(total, weight, bias, eps), total


def _silu_mul(gate_up: Tensor, interleaved: bool) -> Results:
    gate, up = (gate_up[:, ::2], gate_up[:, 1::2]) if interleaved else gate_up.chunk(2, -1)
    return (gate * logistic(gate) * up,)


def _quick_gelu(x: Tensor) -> Results:
    return (x * logistic(1.702 * x),)


def _linear_quick_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Results:
    return _quick_gelu(x @ weight.T + bias)


def _qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    inv_freq: Tensor,
    positions: Tensor,
    slots: Tensor,
    pages: KVPages,
    eps: float,
) -> Results:
    _, kv_heads, page_size, dim = pages.k.shape
    heads = qkv.unflatten(1, (-1, dim))
    q, k, v = heads.tensor_split([heads.shape[1] - 2 * kv_heads, heads.shape[1] - kv_heads], 1)
    q = rope_half(rms(q, q_weight, eps), positions, inv_freq)
    k = rope_half(rms(k, k_weight, eps), positions, inv_freq)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            page, offset = divmod(slot, page_size)
            pages.k[page, :, offset], pages.v[page, :, offset] = k[token], v[token]
    return q, pages.k, pages.v


def _prefix_attention(
    q: Tensor,
    pages: KVPages,
    plan: PrefixPlan,
    scale: float,
    window: int = 0,
    return_lse: bool = False,
) -> Results:
    """Row by row, over the tokens that the row sees, in sequence order."""
    keys, values = pages.k, pages.v
    if pages.k_scale is not None:
        keys, values = keys * pages.k_scale[..., None], values * pages.v_scale[..., None]
    out = torch.zeros_like(q)
    lse = q.new_full(q.shape[:2], -torch.inf)
    for row in range(len(q)):
        slots = _visible_tokens(plan, row)[-window:]  # window 0: all
        if slots:
            page, offset = torch.tensor(slots).T
            k, v = keys[page, :, offset], values[page, :, offset]
            out[row : row + 1], lse[row : row + 1] = attention(q[row : row + 1], k, v, scale)
    return (out, lse) if return_lse else (out,)


def _visible_tokens(plan: PrefixPlan, row: int) -> list[tuple[int, int]]:
    """Page and offset of each token that a row sees."""
    slots = []
    for node in plan.nodes:
        if node.row_start <= row < node.row_end:
            visible = min(node.kv_len, node.kv_len - node.num_new + row - node.row_start + 1)
            indices = (divmod(token, plan.page_size) for token in range(visible))
            slots += [(node.pages[index], offset) for index, offset in indices]
    return slots


def _rotary_attention(
    pages: KVPages, plan: PrefixPlan, scale: float, window: int, **inputs: Tensor
) -> Results:
    q, k, v = _qk_norm_rope(**inputs, pages=pages, eps=1e-6)
    return *_prefix_attention(q, pages, plan, scale, window), k, v


def _vision_attention(
    qkv: Tensor, grids: Sequence[Grid], heads: int, theta: float = 1e4
) -> Results:
    outs = []
    for view, grid in split_views(qkv, grids):
        q, k, v = view.view(len(view), 3, heads, -1).unbind(1)
        q, k = rope_axial(q, grid, theta), rope_axial(k, grid, theta)
        outs.append(attention(q, k, v, q.shape[-1] ** -0.5)[0].flatten(1))
    return (torch.cat(outs),)


def _projector(
    x: Tensor,
    grids: Sequence[Grid],
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    folded: object,
    out: Tensor | None = None,
    rows: Tensor | None = None,
) -> Results:
    views = [downsample(view, grid, (w1, b1), (w2, b2)) for view, grid in split_views(x, grids)]
    result = torch.cat(views) @ w3.T
    if out is None:
        return (result,)
    out[rows] = result
    return (out,)


def _sample(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    logprobs: str,
) -> Results:
    """Row by row, by sorting. No row has a tie within rounding that fp32 forms could break
    differently."""
    tokens, drawn = [], []
    for row, seed, position in zip(logits, seeds.tolist(), positions.tolist(), strict=True):
        z = (row - row.max()) / temperature
        ordered = z.sort(descending=True).values
        if top_k:
            ordered = ordered[ordered >= ordered[min(top_k, len(z)) - 1]]
        mass = ordered.exp().cumsum(0)
        last = ordered[min(int((mass < top_p * mass[-1]).sum()), len(ordered) - 1)]
        noise = torch.from_numpy(_noise(len(z), seed, position))
        token = (z + noise).masked_fill(z < last, -torch.inf).argmax()
        scores = row if logprobs == "raw" else z.masked_fill(z < last, -torch.inf)
        tokens.append(token)
        drawn.append(scores[token] - scores.logsumexp(0))
    return torch.stack(tokens), torch.stack(drawn)


def _noise(vocab: int, seed: int, position: int) -> np.ndarray:
    """-log(-log1p(-u)) [vocab], with u from Philox4x32-10 in NumPy's unsigned integers."""
    index = np.arange(cdiv(vocab, 4), dtype=np.uint64)
    low, mask = np.uint64(32), np.uint64(WORD - 1)
    c = [index, *(np.full_like(index, x) for x in (position % WORD, position // WORD % WORD, 0))]
    k = [seed % WORD, seed // WORD % WORD]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        first, third = (np.uint64(key) for key in k)
        c = [(b >> low) ^ c[1] ^ first, b & mask, (a >> low) ^ c[3] ^ third, a & mask]
        k = [(k[0] + 0x9E3779B9) % WORD, (k[1] + 0xBB67AE85) % WORD]
    words = np.stack(c, 1).ravel()[:vocab].astype(np.float32)
    u = np.minimum((words + np.float32(0.5)) * np.float32(1 / WORD), np.float32(1 - 2**-24))
    return -np.log(-np.log1p(-u.astype(np.float64)))


FORMULAS: dict[str, Callable[..., Results]] = {
    "prefix_attention": _prefix_attention,
    "rotary_attention": _rotary_attention,
    "qk_norm_rope": _qk_norm_rope,
    "rms_norm": _rms_norm,
    "silu_mul": _silu_mul,
    "sample": _sample,
    "vision_attention": _vision_attention,
    "layer_norm": _layer_norm,
    "quick_gelu": _quick_gelu,
    "linear_quick_gelu": _linear_quick_gelu,
    "projector": _projector,
}
