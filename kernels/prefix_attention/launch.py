"""The launcher of prefix attention's Triton form."""

import math

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.kv_pages import KVPages
from kernels.prefix_attention.check import faults_of, raise_fault
from kernels.prefix_attention.configs import InputClass
from kernels.prefix_attention.fused_decode import Rotary
from kernels.prefix_attention.kernel import prefix_attention_kernel
from kernels.prefix_attention.merge import merge_kernel
from kernels.prefix_attention.schedule import ScheduleSpec, schedule_of
from kernels.prefix_plan import PrefixPlan
from kernels.runtime.configs import KernelConfig, gpu_of
from kernels.runtime.dispatch import check
from kernels.runtime.dtypes import DTYPES
from kernels.runtime.fp8 import converts_e4m3
from kernels.runtime.pdl import pdl_options

HEAD_DIMS = (16, 32, 64, 128, 256)
PAGE_SIZES = (16, 32, 64, 128)
LOG2E = 1 / math.log(2)


def prefix_attention_triton(
    q: Tensor,
    pages: KVPages,
    plan: PrefixPlan,
    scale: float,
    *,
    window: int = 0,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """`prefix_attention` in two launches; the first use of a plan cuts up its work before."""
    made = plan_launch(plan, q, q.shape[1], pages, window=window, batch_invariant=batch_invariant)
    return launch(q, pages, plan, *made, scale)


def plan_launch(
    plan: PrefixPlan,
    q: Tensor,
    heads: int,
    pages: KVPages,
    *,
    window: int,
    batch_invariant: bool = False,
    fused: bool = False,
) -> tuple[ScheduleSpec, list[KernelConfig]]:
    """How to cut the plan for q or its projection and so many query heads, and the tile choices of
    the launch that attends: or of two, the second for the smaller tiles.

    Raises ValueError for what the Triton form does not offer.
    """
    kv_heads, page_size, dim = pages.kv_heads, pages.page_size, pages.head_dim
    check(q.dtype in DTYPES, f"q must be bf16, fp16 or fp32, not {q.dtype}")
    check(q.is_contiguous(), "q must be contiguous")
    check(dim in HEAD_DIMS, f"head_dim {dim}: impl 'triton' has {HEAD_DIMS}")
    check(page_size in PAGE_SIZES, f"page_size {page_size}: impl 'triton' has {PAGE_SIZES}")
    group = heads // kv_heads
    kind = InputClass.of(plan, group, dim, fp8=pages.fp8, invariant=batch_invariant, fused=fused)
    most = max(kind.large, kind.small)
    check(group <= most, f"{group} query heads per KV head: impl 'triton' has at most {most}")
    chosen = kind.choose(q.device)
    choices = [chosen]
    if chosen["split"] and kind.large and kind.small:
        check(bool(chosen["pieces"]), "tile choice split: only with pieces")
        choices.append(kind.choose_small(q.device))
    for each in choices:
        whole = chosen["grain"] % min(each["block"], page_size) == 0
        check(whole or not each["tma"], "tile choice tma: grain must be a multiple of block")
    sms = gpu_of(q.device).sms
    spec = ScheduleSpec(
        kv_heads=kv_heads,
        group=group,
        sizes=(kind.large, kind.small),
        grain=chosen["grain"],
        overhead=0 if batch_invariant else chosen["overhead"],
        programs=sms * chosen["programs"],
        window=window,
        invariant=batch_invariant,
        pieces=bool(chosen["pieces"]),
        small_programs=sms * choices[1]["programs"] if len(choices) > 1 else 0,
    )
    return spec, choices


def launch(
    q: Tensor,
    pages: KVPages,
    plan: PrefixPlan,
    spec: ScheduleSpec,
    choices: list[KernelConfig],
    scale: float,
    rotary: Rotary | None = None,
) -> tuple[Tensor, Tensor]:
    """All launches, and before a plan's first ones its schedule.

    q: [T, Hq, D], or with `rotary` the projection [T, (Hq + 2 Hkv) * D]
    """
    rows, dim = len(q), pages.head_dim
    heads = spec.kv_heads * spec.group
    out = q.new_empty(rows, heads, dim)
    lse = q.new_empty(rows, heads, dtype=torch.float32)
    if not rows:
        return out, lse
    schedule = schedule_of(plan, spec)
    vectors = sum(
        partials * size for partials, size in zip(schedule.partials, spec.sizes, strict=True)
    )
    both = {  # what both kernels take
        "out": out,
        "lse": lse,
        "part_out": q.new_empty(vectors, dim, dtype=torch.float32),
        "part_lse": q.new_empty(vectors, dtype=torch.float32),
        "KV_HEADS": spec.kv_heads,
        "GROUP": spec.group,
        "D": dim,
        "INVARIANT": spec.invariant,
        **pdl_options(choices[0], q.device),
        **schedule.line,
    }
    for number, chosen in enumerate(choices):
        sizes = spec.sizes
        if len(choices) > 1:
            sizes = (0, spec.sizes[1]) if number else (spec.sizes[0], 0)
        programs = spec.programs_of(number)
        block = min(chosen["block"], plan.page_size)
        faults = faults_of(programs, q.device)
        prefix_attention_kernel[(programs,)](
            q=q,
            **_pages(pages, block if chosen["tma"] else 0),
            page_table=plan.pages,
            pieces=schedule.pieces if spec.pieces else None,
            large_programs=spec.programs_of(0),
            first_tile=schedule.first_tile,
            row_position=plan.row_position if spec.window else None,
            rotary=rotary,
            qk_scale=scale * LOG2E,
            grain=spec.grain,
            SIZES=sizes,
            PAGE=plan.page_size,
            BLOCK=block,
            WINDOW=spec.window,
            NATIVE_FP8=converts_e4m3(q.device),
            faults=(*faults, len(schedule.pieces)) if faults else (),
            **_form(chosen, spec, fp8=pages.fp8),
            **both,
        )
        raise_fault(faults)
    merge_kernel[(rows, heads)](
        row_tiles=schedule.row_tiles,
        depth=schedule.row_tiles.shape[1],
        SIZES=spec.sizes,
        SPLIT=bool(spec.small_programs),
        AT_ONCE=1 if spec.invariant else max(1, 1024 // dim),
        num_warps=1,
        **both,
    )
    return out, lse


def _form(chosen: KernelConfig, spec: ScheduleSpec, *, fp8: bool) -> dict[str, bool | int]:
    """The kernel's switches and options, as its tile choices have them."""
    return {
        "TMA": bool(chosen["tma"]),
        "PIECES": spec.pieces,
        "AHEAD": bool(chosen["ahead"]),
        # The order of blocks would depend on other rows' windows.
        "STEADY": bool(chosen["steady"] and not (spec.invariant and spec.window)),
        "HALF": fp8 and bool(chosen["fp16"]),
        "num_warps": chosen["num_warps"],
        "num_stages": chosen["num_stages"],
    }


def _pages(pages: KVPages, block: int) -> dict:
    """The kernel's arguments for K and V; with `block` also descriptors of blocks of so many."""
    kv = pages.as_bytes()
    return {
        "kv": kv,
        "k_blocks": _descriptor(kv.k, block) if block else None,
        "v_blocks": _descriptor(kv.v, block) if block else None,
    }


def _descriptor(pages: Tensor, block: int) -> TensorDescriptor:
    """Pages as rows of head_dim, of which a tensor copy takes a block of one head's page."""
    dim = pages.shape[-1]
    return TensorDescriptor.from_tensor(pages.view(-1, dim), [block, dim])
