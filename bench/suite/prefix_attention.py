"""Attention of rows over a prefix tree of KV pages."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from bench.errors import Error
from bench.formats.traffic import Point
from bench.fp64 import attention
from bench.inputs import forests
from bench.inputs.draws import Device, NormalDraws
from bench.inputs.plans import prefix_plan, quantised, unused_slots, visible_tokens
from bench.inputs.presets import BIG, SMOLLM2, WIDE, Heads, heads_of
from bench.inputs.trees import Node, fork
from bench.peers import flashinfer_peer
from bench.peers.compile_peer import COMPILE
from bench.peers.fasttree_peer import FASTTREE, tree
from bench.peers.flash_attention import fa2_peer, fa3_peer
from bench.peers.flash_attention.fa2_peer import FA2
from bench.peers.flash_attention.fa3_peer import FA3
from bench.peers.flashinfer_peer import FLASHINFER
from bench.peers.flex_peer import flex
from bench.peers.peer import TORCH, Peer
from bench.peers.projector_peer import CUDNN
from bench.peers.sdpa_peer import sdpa
from bench.peers.xformers_peer import XFORMERS, split_k
from bench.suite.op import Case, Op, Shape
from kernels.kv_pages import KVPages
from kernels.prefix_attention import prefix_attention
from kernels.prefix_plan import PrefixPlan
from model.config import Config


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
    return_lse: bool = False,
) -> dict:
    """`return_lse` requests the log-sum-exp as well; `fp8` makes the pages e4m3 with scales."""
    draw = NormalDraws(seed, device, dtype)
    plan = prefix_plan(seed, device, forest=forest, page_size=page_size)
    unused = unused_slots(plan).to(device)[:, None, :, None]
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


def case(
    name: str,
    forest: Sequence[Node],
    *,
    heads: Heads | None = None,
    peers: tuple[str, ...] = (),
    **options: int,
) -> Case:
    """`options` go to the inputs: window, and the flags fp8 and return_lse."""
    q_heads, kv_heads, dim = heads or heads_of(BIG)
    shape: Shape = {"heads": q_heads, "kv_heads": kv_heads, "head_dim": dim, **options}
    fp8 = options.get("fp8", False)
    tokens, pairs = visible_tokens(forest, options.get("window", 0))
    q = sum(root.rows for root in forest) * q_heads * dim
    kv = 2 * tokens * kv_heads
    return Case(
        op="prefix_attention",
        name=name,
        inputs=partial(inputs, forest=tuple(forest), **shape),
        values=2 * q + (0 if fp8 else kv * dim),
        fixed_bytes=kv * (dim + 4) if fp8 else 0,
        flops=4 * pairs * q_heads * dim,
        shape=forest_shape(forest) | shape,
        peers=peers,
        modes=("triton-invariant",),
    )


def forest_shape(forest: Sequence[Node]) -> Shape:
    """Trees, rows and tokens; `batch`, `prefix` and `suffix` of a single fork of equal leaves."""
    nodes = [*chain.from_iterable(root.walk() for root in forest)]
    shape: Shape = {
        "trees": len(forest),
        "rows": sum(root.rows for root in forest),
        "tokens": sum(node.tokens for node in nodes),
    }
    root = forest[0]
    suffixes = [child.tokens for child in root.children]
    if suffixes and list(forest) == [fork(root.tokens, suffixes[:1] * len(suffixes))]:
        shape |= {"batch": len(suffixes), "prefix": root.tokens, "suffix": suffixes[0]}
    return shape


def cases(device_type: str) -> Iterator[Case]:
    yield from _cpu_cases() if device_type == "cpu" else _cuda_cases()


def _cpu_cases() -> Iterator[Case]:
    yield case("B16 P2048 S128", [fork(2048, [128] * 16)])
    yield case("4 x (B4 P512 S64)", [fork(512, [64] * 4)] * 4)
    forest = [fork(1500, [64] * 16)]
    yield case("smollm2 B16 P1500 S64", forest, heads=heads_of(SMOLLM2))
    yield case("prefill 128 behind 896", [Node(1024, new=128)])


def _cuda_cases() -> Iterator[Case]:
    for name, forest in forests.main_forests():
        yield case(name, forest)
    for point in ((16, 2048, 512), (32, 4096, 512)):
        name, forest = forests.rollouts(*point)
        yield case(f"{name} fp8", forest, fp8=True)
        yield case(f"{name} window 512", forest, window=512)
        yield case(f"{name} 64/1 heads of 256", forest, heads=WIDE)
    yield case("B32 P4096 S512 fp8 window 512", forest, fp8=True, window=512)
    yield case("prefill 2048", [Node(2048, new=2048)])
    yield case("prefill 2048 behind 8192", [Node(10240, new=2048)])
    yield case("prefill 2048 behind 8192 fp8", [Node(10240, new=2048)], fp8=True)


def grid(device_type: str) -> Iterator[Case]:
    """Batches, prefixes and suffixes; on a GPU also long contexts."""
    if device_type == "cpu":
        for point in forests.CPU_GRID:
            name, forest = forests.rollouts(*point)
            yield case(f"smollm2 {name}", forest, heads=heads_of(SMOLLM2))
        return
    for name, forest in forests.grid():
        yield case(name, forest)
    name, forest = forests.rollouts(64, 8192, 1024)
    yield case(f"{name} fp8", forest, fp8=True)
    for name, forest in forests.long_contexts():
        yield case(name, forest)
        yield case(f"{name} fp8", forest, fp8=True)


def of_traffic(point: Point, model: Config) -> Iterator[Case]:
    _, forest = forests.rollouts(point.batch, point.prefix, point.suffix)
    yield case(point.name, forest, heads=heads_of(model))
    prefill = [Node(point.prefix, new=point.prefix)]
    yield case(f"prefill {point.prefix}", prefill, heads=heads_of(model))


def checks() -> Iterator[Case]:
    middle = Node(0, children=(Node(1, new=1), Node(129, new=2)))
    tree = Node(70, children=(middle, Node(64)))
    forest = [fork(130, [1, 63, 64, 65]), tree, Node(5, new=5), Node(100, new=37)]
    options_by_name: dict[str, Shape] = {
        "ragged forest": {},
        "smollm2 ragged forest": {"heads": heads_of(SMOLLM2)},
        "ragged forest fp8": {"fp8": True},
        "ragged forest window 70": {"window": 70},
        "64/1 heads of 256, fp8, window 70": {"heads": WIDE, "fp8": True, "window": 70},
    }
    for name, options in options_by_name.items():
        yield case(name, forest, return_lse=True, **options)


def compiled_cases() -> Iterator[Case]:
    decode, prefill = [fork(2048, [512] * 16)], [Node(1024, new=512)]
    extra = [case("decode with lse", decode, return_lse=True), case("decode fp8", decode, fp8=True)]
    for heads in (heads_of(SMOLLM2), WIDE):
        extra.append(case(f"decode D{heads[2]}", decode, heads=heads))
        extra.append(case(f"prefill D{heads[2]}", prefill, heads=heads))
    for one in extra:
        yield replace(one, modes=())


def formula(
    q: Tensor,
    pages: KVPages,
    plan: PrefixPlan,
    scale: float,
    window: int = 0,
    return_lse: bool = False,
) -> tuple[Tensor, ...]:
    """Row by row, over the tokens that the row sees, in sequence order."""
    keys, values = pages.k, pages.v
    if pages.k_scale is not None and pages.v_scale is not None:
        keys, values = keys * pages.k_scale[..., None], values * pages.v_scale[..., None]
    out = torch.zeros_like(q)
    lse = q.new_full(q.shape[:2], -torch.inf)
    for row in range(len(q)):
        slots = _seen_by(plan, row)[-window:]  # window 0: all
        if slots:
            page, offset = torch.tensor(slots).T
            k, v = keys[page, :, offset], values[page, :, offset]
            out[row : row + 1], lse[row : row + 1] = attention(q[row : row + 1], k, v, scale)
    return (out, lse) if return_lse else (out,)


def _seen_by(plan: PrefixPlan, row: int) -> list[tuple[int, int]]:
    """Page and offset of each token that a row sees."""
    slots = []
    for node in plan.nodes:
        if node.row_start <= row < node.row_end:
            visible = min(node.kv_len, node.kv_len - node.num_new + row - node.row_start + 1)
            indices = (divmod(token, plan.page_size) for token in range(visible))
            slots += [(node.pages[index], offset) for index, offset in indices]
    return slots


OP = Op(
    name="prefix_attention",
    rank=10,
    run=prefix_attention,
    varies="q",
    cases=cases,
    grid=grid,
    of_traffic=of_traffic,
    checks=checks,
    compiled=compiled_cases,
    formula=formula,
    tolerance_16=Error(6, 0.75),
    tolerance_32=Error(320, 32),
    results=("out", "lse"),
    fp32_results=("lse",),
    peers=tuple(
        Peer(name, "prefix_attention", prepare, library, on_cpu=name == "sdpa")
        for name, library, prepare in (
            ("sdpa", TORCH, sdpa),
            ("sdpa-flash", TORCH, partial(sdpa, backend="FLASH_ATTENTION")),
            ("sdpa-cudnn", CUDNN, partial(sdpa, backend="CUDNN_ATTENTION")),
            ("flex", COMPILE, flex),
            ("flashinfer", FLASHINFER, flashinfer_peer.plain),
            ("flashinfer-copied", FLASHINFER, partial(flashinfer_peer.plain, copied=True)),
            ("flashinfer-cascade", FLASHINFER, flashinfer_peer.cascade),
            ("fa2", FA2, fa2_peer.one_call),
            ("fa2-copied", FA2, partial(fa2_peer.one_call, copied=True)),
            ("fa3", FA3, fa3_peer.one_call),
            ("fa3-copied", FA3, partial(fa3_peer.one_call, copied=True)),
            ("fa3-cascade", FA3, fa3_peer.cascade),
            ("fasttree", FASTTREE, tree),
            ("xformers", XFORMERS, split_k),
        )
    ),
)
