"""Seeded inputs of every op, for benchmarks and tests.

Each builder returns the keyword arguments of its op. Numbers are random, never zeros: hardware runs
faster on zeros. Everything that an op must not read is NaN: pages that no node owns, and slots
after a node's last token.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.kv_pages import KVPages
from kernels.plan_node import PlanNode
from kernels.prefix_plan import PrefixPlan
from kernels.projector import fold, output_tokens
from kernels.runtime.fp8 import quantise_e4m3
from kernels.runtime.grids import Grid, tokens_of

Device = torch.device | str


@dataclass(frozen=True)
class Node:
    """A node of a prefix tree: its tokens, how many of them this step writes, its children."""

    tokens: int
    new: int = 0
    children: tuple["Node", ...] = ()

    @property
    def rows(self) -> int:
        """Query rows of the node and its subtree."""
        return self.new + sum(child.rows for child in self.children)

    def walk(self) -> Iterator["Node"]:
        """The node and its subtree, depth-first."""
        yield self
        for child in self.children:
            yield from child.walk()


def fork(prefix: int, suffixes: Iterable[int]) -> Node:
    """A decode step's rollouts: a shared prefix, and a leaf per suffix whose last token is new."""
    return Node(prefix, children=tuple(Node(suffix, new=1) for suffix in suffixes))


def rms_norm_inputs(
    seed: int, device: Device, dtype: torch.dtype, *, rows: int, width: int, residual: bool = True
) -> dict:
    draw = _NormalDraws(seed, device, dtype)
    return {
        "x": draw(rows, width),
        "weight": 1 + draw(width, scale=0.1),
        "residual": draw(rows, width) if residual else None,
        "eps": 1e-6,
    }


def layer_norm_inputs(
    seed: int, device: Device, dtype: torch.dtype, *, rows: int, width: int, residual: bool = True
) -> dict:
    draw = _NormalDraws(seed, device, dtype)
    return {
        "x": draw(rows, width),
        "weight": 1 + draw(width, scale=0.1),
        "bias": draw(width, scale=0.1),
        "residual": draw(rows, width) if residual else None,
        "gamma": draw(width, scale=0.1) if residual else None,
        "eps": 1e-5,
    }


def silu_mul_inputs(
    seed: int,
    device: Device,
    dtype: torch.dtype,
    *,
    rows: int,
    width: int,
    interleaved: bool = False,
) -> dict:
    """`width` is F: the input has 2F columns."""
    gate_up = _NormalDraws(seed, device, dtype)(rows, 2 * width)
    return {"gate_up": gate_up, "interleaved": interleaved}


def quick_gelu_inputs(
    seed: int, device: Device, dtype: torch.dtype, *, rows: int, width: int
) -> dict:
    return {"x": _NormalDraws(seed, device, dtype)(rows, width)}


def linear_quick_gelu_inputs(
    seed: int, device: Device, dtype: torch.dtype, *, rows: int, width: int, out: int
) -> dict:
    draw = _NormalDraws(seed, device, dtype)
    return {
        "x": draw(rows, width),
        "weight": draw(out, width, scale=width**-0.5),
        "bias": draw(out, scale=0.1),
    }


def qk_norm_rope_inputs(
    seed: int,
    device: Device,
    dtype: torch.dtype,
    *,
    rows: int,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    page_size: int = 64,
    theta: float = 1e6,
    skip: int = 0,
) -> dict:
    """Rows go to distinct random slots in twice the pages needed; the first `skip` rows to none."""
    draw = _NormalDraws(seed, device, dtype)
    num_pages = 2 * math.ceil(rows / page_size)
    slots = torch.randperm(num_pages * page_size, generator=draw.host)[:rows]
    slots[:skip] = -1
    shape = (num_pages, kv_heads, page_size, head_dim)
    empty = torch.full(shape, math.nan, device=device, dtype=dtype)
    pair = torch.arange(head_dim // 2, device=device).float()
    return {
        "qkv": draw(rows, (heads + 2 * kv_heads) * head_dim),
        "q_weight": 1 + draw(head_dim, scale=0.1),
        "k_weight": 1 + draw(head_dim, scale=0.1),
        "inv_freq": theta ** (-2 * pair / head_dim),
        "positions": torch.randint(0, 4096, (rows,), generator=draw.host).to(device),
        "slots": slots.to(device),
        "pages": KVPages(empty, empty.clone()),
        "eps": 1e-6,
    }


def prefix_attention_inputs(
    seed: int,
    device: Device,
    dtype: torch.dtype,
    *,
    forest: Sequence[Node],
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    page_size: int = 64,
    window: int = 0,
    fp8: bool = False,
    return_lse: bool = False,
) -> dict:
    """`return_lse` requests the log-sum-exp as well; `fp8` makes the pages e4m3 with scales."""
    draw = _NormalDraws(seed, device, dtype)
    plan = prefix_plan(seed, device, forest=forest, page_size=page_size)
    unused = _unused(plan).to(device)[:, None, :, None]
    shape = (plan.num_pages, kv_heads, page_size, head_dim)
    q = draw(plan.num_rows, heads, head_dim)
    pages = KVPages(*(draw(*shape).masked_fill_(unused, math.nan) for _ in range(2)))
    return {
        "q": q,
        "pages": quantised(pages) if fp8 else pages,
        "plan": plan,
        "scale": head_dim**-0.5,
        "window": window,
        "return_lse": return_lse,
    }


def rotary_attention_inputs(
    seed: int,
    device: Device,
    dtype: torch.dtype,
    *,
    forest: Sequence[Node],
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    page_size: int = 64,
    window: int = 0,
    fp8: bool = False,
    theta: float = 1e6,
) -> dict:
    """Inputs of a decode step: the new K and V are not in the pages yet; their slots are NaN."""
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_size": page_size}
    arguments = prefix_attention_inputs(seed, device, dtype, forest=forest, window=window, **shape)
    del arguments["q"], arguments["return_lse"]
    plan = arguments["plan"]
    leaves = [node for node in plan.nodes if node.num_new]
    positions = [node.kv_len - 1 for node in leaves]
    page = torch.tensor(
        [n.pages[position // page_size] for n, position in zip(leaves, positions, strict=True)]
    )
    page, offset = page.to(device), torch.tensor(positions, device=device) % page_size
    draw = _NormalDraws(seed + 1, device, dtype)
    pair = torch.arange(head_dim // 2, device=device).float()
    arguments |= {
        "qkv": draw(plan.num_rows, (heads + 2 * kv_heads) * head_dim),
        "q_weight": 1 + draw(head_dim, scale=0.1),
        "k_weight": 1 + draw(head_dim, scale=0.1),
        "inv_freq": theta ** (-2 * pair / head_dim),
        "positions": plan.row_position.long(),
        "slots": page * page_size + offset,
    }
    for x in (arguments["pages"].k, arguments["pages"].v):
        x[page, :, offset] = math.nan
    if fp8:
        arguments["pages"] = quantised(arguments["pages"])
    return arguments


def quantised(pages: KVPages) -> KVPages:
    """The same values as FP8 pages; NaN stays NaN, in pages and scales."""
    (k, k_scale), (v, v_scale) = quantise_e4m3(pages.k), quantise_e4m3(pages.v)
    return KVPages(k, v, k_scale, v_scale)


def prefix_plan(
    seed: int, device: Device, *, forest: Sequence[Node], page_size: int = 64
) -> PrefixPlan:
    """A plan of several trees on pages with shuffled ids; about an eighth of the pages stays
    unused."""
    needed = sum(math.ceil(n.tokens / page_size) for root in forest for n in root.walk())
    num_pages = needed + needed // 8 + 1
    free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).tolist()
    nodes: list[PlanNode] = []
    row = 0
    for root in forest:
        row = _add_nodes(root, row, page_size, free, nodes)
    return PrefixPlan.build(
        nodes, num_rows=row, num_pages=num_pages, page_size=page_size, device=device
    )


def vision_attention_inputs(
    seed: int,
    device: Device,
    dtype: torch.dtype,
    *,
    grids: Sequence[Grid],
    heads: int,
    head_dim: int = 96,
) -> dict:
    qkv = _NormalDraws(seed, device, dtype)(tokens_of(grids), 3 * heads * head_dim)
    return {"qkv": qkv, "grids": tuple(grids), "heads": heads}


def projector_inputs(
    seed: int,
    device: Device,
    dtype: torch.dtype,
    *,
    grids: Sequence[Grid],
    width: int,
    out: int,
    scattered: bool = False,
) -> dict:
    """Channels double with each convolution, as in every preset. Weights are channels-last, as in
    the model, and also folded. With `scattered`, results go to random rows of a NaN output that has
    twice as many rows."""
    draw = _NormalDraws(seed, device, dtype)

    def kernel(*shape: int) -> Tensor:
        weight = draw(*shape, scale=(9 * shape[1]) ** -0.5)
        return weight.contiguous(memory_format=torch.channels_last)

    arguments = {
        "x": draw(tokens_of(grids), width),
        "grids": tuple(grids),
        "w1": kernel(2 * width, width, 3, 3),
        "b1": draw(2 * width, scale=0.1),
        "w2": kernel(4 * width, 2 * width, 3, 3),
        "b2": draw(4 * width, scale=0.1),
        "w3": draw(out, 4 * width, scale=(4 * width) ** -0.5),
    }
    arguments["folded"] = fold(arguments["w2"], arguments["b2"], arguments["w3"])
    if scattered:
        tokens = sum(map(output_tokens, grids))
        rows = torch.randperm(2 * tokens, generator=draw.host)[:tokens]
        arguments["out"] = torch.full((2 * tokens, out), math.nan, device=device, dtype=dtype)
        arguments["rows"] = rows.to(device)
    return arguments


def sample_inputs(
    seed: int,
    device: Device,
    dtype: torch.dtype,
    *,
    rows: int,
    vocab: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    logprobs: str = "raw",
) -> dict:
    draw = _NormalDraws(seed, device, dtype)
    return {
        "logits": draw(rows, vocab, scale=3.0),
        "seeds": torch.randint(0, 2**62, (rows,), generator=draw.host).to(device),
        "positions": torch.arange(1000, 1000 + rows, device=device),
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "logprobs": logprobs,
    }


class _NormalDraws:
    """Draws normal numbers on a device from its own generators: the global ones stay untouched."""

    def __init__(self, seed: int, device: Device, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.host = torch.Generator().manual_seed(seed)
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        device = self.generator.device
        x = torch.randn(shape, generator=self.generator, device=device, dtype=self.dtype)
        return x if scale == 1.0 else x.mul_(scale)


def _add_nodes(node: Node, row: int, page_size: int, free: list[int], nodes: list[PlanNode]) -> int:
    """Give `node` and its subtree pages, and rows starting at `row`; returns the next free row."""
    pages = [free.pop() for _ in range(math.ceil(node.tokens / page_size))]
    nodes.append(PlanNode(tuple(pages), node.tokens, row, row + node.rows, node.new))
    row += node.new
    for child in node.children:
        row = _add_nodes(child, row, page_size, free, nodes)
    return row


def _unused(plan: PrefixPlan) -> Tensor:
    """Which slots hold no token: bool [num_pages, page_size]."""
    unused = torch.ones(plan.num_pages, plan.page_size, dtype=torch.bool)
    for node in plan.nodes:
        slots = torch.ones(len(node.pages) * plan.page_size, dtype=torch.bool)
        slots[: node.kv_len] = False
        unused[list(node.pages)] = slots.view(len(node.pages), plan.page_size)
    return unused
