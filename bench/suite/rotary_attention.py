"""A decode step's norm, rotation, KV write and attention in one op."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bench.errors import Error
from bench.formats.traffic import Point
from bench.inputs.draws import Device, NormalDraws
from bench.inputs.plans import quantised
from bench.inputs.presets import BIG, SMOLLM2, WIDE, Heads, heads_of
from bench.inputs.trees import Node, fork
from bench.suite import prefix_attention as attention
from bench.suite import qk_norm_rope
from bench.suite.op import Case, Op, Shape
from kernels.kv_pages import KVPages
from kernels.prefix_plan import PrefixPlan
from kernels.rotary_attention import rotary_attention
from kernels.rotary_tables import rotary_frequencies
from model.config import Config
from model.rope import inverse_frequencies


def inputs(
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
    arguments = attention.inputs(
        seed,
        device,
        dtype,
        forest=forest,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        window=window,
    )
    del arguments["q"], arguments["return_lse"]
    plan = arguments["plan"]
    leaves = [node for node in plan.nodes if node.num_new]
    positions = [node.kv_len - 1 for node in leaves]
    page = torch.tensor(
        [n.pages[position // page_size] for n, position in zip(leaves, positions, strict=True)]
    )
    page, offset = page.to(device), torch.tensor(positions, device=device) % page_size
    draw = NormalDraws(seed + 1, device, dtype)
    arguments |= {
        "qkv": draw(plan.num_rows, (heads + 2 * kv_heads) * head_dim),
        "q_weight": 1 + draw(head_dim, scale=0.1),
        "k_weight": 1 + draw(head_dim, scale=0.1),
        "frequencies": rotary_frequencies(inverse_frequencies(theta, head_dim)).to(device),
        "positions": plan.row_position.long(),
        "slots": page * page_size + offset,
    }
    for x in (arguments["pages"].k, arguments["pages"].v):
        x[page, :, offset] = math.nan
    if fp8:
        arguments["pages"] = quantised(arguments["pages"])
    return arguments


def case(name: str, forest: Sequence[Node], heads: Heads | None = None, fp8: bool = False) -> Case:
    """Attention's traffic, with the projection instead of Q."""
    base = attention.case(name, forest, heads=heads, fp8=fp8)
    q_heads, kv_heads, dim = heads or heads_of(BIG)
    shape: Shape = {"heads": q_heads, "kv_heads": kv_heads, "head_dim": dim, "fp8": fp8}
    rows = sum(root.rows for root in forest)
    return replace(
        base,
        op="rotary_attention",
        inputs=partial(inputs, forest=tuple(forest), **shape),
        # The new K and V are read from the projection and written to pages.
        values=base.values + 2 * rows * kv_heads * dim + 2 * dim,
        flops=base.flops + 7 * rows * (q_heads + kv_heads) * dim,
        modes=("triton-separate",),
    )


def cases(device_type: str) -> Iterator[Case]:
    if device_type == "cpu":
        yield case("B16 P2048 S128", [fork(2048, [128] * 16)])
        return
    for batch, prefix, suffix in ((16, 2048, 512), (64, 8192, 1024), (1, 2048, 512)):
        yield case(f"B{batch} P{prefix} S{suffix}", [fork(prefix, [suffix] * batch)])


def of_traffic(point: Point, model: Config) -> Iterator[Case]:
    forest = [fork(point.prefix, [point.suffix] * point.batch)]
    yield case(point.name, forest, heads=heads_of(model))


def checks() -> Iterator[Case]:
    yield case("ragged decode", [fork(130, [1, 63, 64, 65]), Node(100, new=1)])
    forest = [fork(70, [1, 9, 2, 33, 64, 5])]
    yield case("smollm2 ragged decode", forest, heads=heads_of(SMOLLM2))


def compiled_cases() -> Iterator[Case]:
    decode = [fork(2048, [512] * 16)]
    for heads in (heads_of(SMOLLM2), WIDE):
        yield replace(case(f"decode D{heads[2]}", decode, heads=heads), modes=())
    yield replace(case("decode fp8", decode, fp8=True), modes=())


def formula(
    pages: KVPages, plan: PrefixPlan, scale: float, window: int, **inputs: Tensor
) -> tuple[Tensor, ...]:
    q, k, v = qk_norm_rope.formula(**inputs, pages=pages, eps=1e-6)
    return *attention.formula(q, pages, plan, scale, window), k, v


OP = Op(
    name="rotary_attention",
    rank=20,
    run=rotary_attention,
    varies="qkv",
    cases=cases,
    of_traffic=of_traffic,
    checks=checks,
    compiled=compiled_cases,
    formula=formula,
    tolerance_16=Error(8, 1.2),
    tolerance_32=Error(220, 30),
    stores=True,
    tuned_part="prefix_attention",
)
