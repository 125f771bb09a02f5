"""Arguments of every operator of torch.ops.pacore, small, for all forms of its op."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.inputs.plans import quantised
from kernels.activation import quick_gelu, silu_mul
from kernels.gemm import convolution, linear
from kernels.kv_pages import KVPages
from kernels.linear_quick_gelu import linear_quick_gelu
from kernels.norm import layer_norm, rms_norm
from kernels.patchify import patchify
from kernels.prefix_attention import prefix_attention
from kernels.prefix_plan import PrefixPlan
from kernels.projector import fold, projector
from kernels.qk_norm_rope import qk_norm_rope
from kernels.rotary_attention import rotary_attention
from kernels.rotary_tables import rotary_frequencies
from kernels.runtime.grids import grids_of
from kernels.sampling import SampleOutput, sample
from kernels.vision_attention import vision_attention
from tests.support.prefix_trees import Node, lay_out

TRITON_ONLY = ("linear", "convolution")
PAGE, DIM, HEADS, KV_HEADS = 16, 16, 4, 2


@dataclass(frozen=True)
class Tree:
    """A decode step of three rollouts with a common prefix, and its projection."""

    qkv: Tensor  # [3, (HEADS + 2 * KV_HEADS) * DIM]
    pages: KVPages
    plan: PrefixPlan
    slots: Tensor
    positions: Tensor


def tree(device: str = "cpu", dtype: torch.dtype = torch.float32, fp8: bool = False) -> Tree:
    suffixes = (3, 17, 1)
    nodes, rows, num_pages = lay_out([Node(37, 0, [Node(n, 1, []) for n in suffixes])], PAGE)
    generator = torch.Generator().manual_seed(3)
    random = lambda *shape: torch.randn(shape, generator=generator).to(device, dtype)  # noqa: E731
    pages = KVPages(*(random(num_pages, KV_HEADS, PAGE, DIM) for _ in "kv"))
    plan = PrefixPlan.build(
        nodes, num_rows=rows, num_pages=num_pages, page_size=PAGE, device=device
    )
    leaves = [node for node in nodes if node.num_new]
    slots = [leaf.pages[-1] * PAGE + (leaf.kv_len - 1) % PAGE for leaf in leaves]
    return Tree(
        random(rows, (HEADS + 2 * KV_HEADS) * DIM),
        quantised(pages) if fp8 else pages,
        plan,
        torch.tensor(slots, device=device),
        plan.row_position.clone(),
    )


_trees: list[Tree] = []  # keeps their plans: only tensors of existing ones are recognised


def calls(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, tuple]:
    """Positional arguments by operator, without `impl`, which all take as a keyword."""
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    step = tree(device, dtype)
    _trees.append(step)
    frequencies = rotary_frequencies([1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003]).to(device)
    rotated = (random(DIM), random(DIM), frequencies, step.positions, step.slots)
    x, rows = random(5, 32), random(32)
    image = torch.randint(256, (4, 6, 3), generator=generator, dtype=torch.uint8).to(device)
    w1, w2, w3 = random(8, 32, 3, 3), random(16, 8, 3, 3), random(24, 16)
    w1, w2 = (w.contiguous(memory_format=torch.channels_last) for w in (w1, w2))
    grids, tokens = [4, 6, 2, 2], random(28, 32)
    weights = (w1, random(8), w2, random(16), w3)
    folded = fold(*weights[2:])
    integers = torch.arange(3, device=device)
    results = torch.zeros(2, 3, dtype=torch.int32, device=device)
    sampled = (random(3, 50), integers, integers, 0.7, 5, 0.9)
    q = random(3, HEADS, DIM)
    return {
        "rms_norm": (x, rows, 1e-6),
        "add_rms_norm": (x, random(5, 32), rows, 1e-6),
        "layer_norm": (x, rows, random(32), 1e-6),
        "add_layer_norm": (x, random(5, 32), rows, random(32), random(32), 1e-6),
        "silu_mul": (x,),
        "quick_gelu": (x,),
        "linear_quick_gelu": (x, random(24, 32), random(24)),
        "patchify": ([image, random(3, 2, 4)], random(3, 256), 2),
        "vision_attention": (random(28, 3 * 2 * 16), grids, 2),
        "projector": (tokens, grids, *weights, *folded),
        "projector_into": (random(9, 24), torch.tensor([8, 1, 4], device=device), tokens, grids)
        + (*weights, *folded),
        "sample": (results, integers.clone(), torch.zeros(4, dtype=torch.int64, device=device))
        + (integers + 1, *sampled),
        "qk_norm_rope": (step.qkv, *rotated, *step.pages),
        "linear": (x, random(24, 32), random(24), True),
        "convolution": (tokens, grids, *weights[:2]),
        "prefix_attention": (q, *step.pages, step.plan.tensors, 0.25),
        "rotary_attention": (step.qkv, *rotated, *step.pages, step.plan.tensors, 0.25),
    }


def copied(arguments: tuple) -> tuple:
    """The arguments with a copy of every tensor but the plan's, which would not be recognised."""
    return tuple(_copy(x) for x in arguments)


def _copy(x: object) -> object:
    if isinstance(x, Tensor):
        return x.clone()
    if isinstance(x, list):
        return [_copy(each) for each in x]
    return x


def direct(name: str, a: tuple, impl: str | None = None) -> object:
    """The call of the op's own function with an operator's arguments; returns what it returns."""
    match name:
        case "rms_norm":
            return rms_norm(a[0], a[1], eps=a[2], impl=impl)
        case "add_rms_norm":
            return rms_norm(a[0], a[2], residual=a[1], eps=a[3], impl=impl)
        case "layer_norm":
            return layer_norm(*a[:3], eps=a[3], impl=impl)
        case "add_layer_norm":
            options = {"residual": a[1], "gamma": a[4], "eps": a[5]}
            return layer_norm(a[0], *a[2:4], **options, impl=impl)
        case "silu_mul":
            return silu_mul(*a, impl=impl)
        case "quick_gelu":
            return quick_gelu(*a, impl=impl)
        case "linear_quick_gelu":
            return linear_quick_gelu(*a, impl=impl)
        case "patchify":
            return patchify(*a[:2], size=a[2], impl=impl)
        case "vision_attention":
            return vision_attention(a[0], grids_of(a[1]), heads=a[2], impl=impl)
        case "projector":
            return projector(a[0], grids_of(a[1]), *a[2:7], folded=a[7:], impl=impl)
        case "projector_into":
            out, rows, x, sides, *weights, folded_weight, folded_bias = a
            options = {"folded": (folded_weight, folded_bias), "out": out, "rows": rows}
            return projector(x, grids_of(sides), *weights, **options, impl=impl)
        case "sample":
            settings = dict(zip(("temperature", "top_k", "top_p"), a[7:], strict=True))
            return sample(*a[4:7], **settings, out=SampleOutput(*a[:4]), impl=impl)
        case "qk_norm_rope":
            return qk_norm_rope(*a[:6], KVPages(*a[6:10]), impl=impl)
        case "linear":
            return linear(*a[:3], quick_gelu=a[3])
        case "convolution":
            return convolution(a[0], grids_of(a[1]), *a[2:])
        case "prefix_attention":
            options = {"scale": a[6], "return_lse": True}
            return prefix_attention(a[0], KVPages(*a[1:5]), a[5], **options, impl=impl)
        case "rotary_attention":
            return rotary_attention(*a[:6], KVPages(*a[6:10]), a[10], scale=a[11], impl=impl)
    raise ValueError(name)


def operator(name: str) -> Callable:
    return getattr(torch.ops.pacore, name)


def impls(name: str, impl: str) -> dict[str, str]:
    """The keyword arguments that choose an implementation."""
    both = ("rope_impl", "attention_impl")
    names = {"rotary_attention": both, **dict.fromkeys(TRITON_ONLY, ())}.get(name, ("impl",))
    return dict.fromkeys(names, impl)
