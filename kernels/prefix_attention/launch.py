"""The launcher of prefix attention's Triton form: validation, kernel configs, launches."""

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
from kernels.runtime.arithmetic import INT32_END
from kernels.runtime.configs import KernelConfig, gpu_of
from kernels.runtime.dispatch import check
from kernels.runtime.dtypes import DTYPES
from kernels.runtime.fp8 import has_native_e4m3
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
    """`prefix_attention` in two launches; the first use of a plan also computes its schedule."""
    spec_and_configs = plan_launch(
        plan, q, q.shape[1], pages, window=window, batch_invariant=batch_invariant
    )
    return launch(q, pages, plan, *spec_and_configs, scale)


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
    """The schedule's parameters, and the kernel config of each attention launch.

    q: [T, Hq, D], or the QKV projection; heads: Hq. There are two attention launches, the second
    for the smaller tiles, if the config has `split`. Raises ValueError for dtypes, layouts and
    sizes that the Triton form does not support.
    """
    kv_heads, page_size, dim = pages.kv_heads, pages.page_size, pages.head_dim
    check(q.dtype in DTYPES, f"q must be bf16, fp16 or fp32, not {q.dtype}")
    check(q.is_contiguous(), "q must be contiguous")
    check(dim in HEAD_DIMS, f"head_dim {dim}: impl 'triton' takes one of {HEAD_DIMS}")
    check(
        page_size in PAGE_SIZES, f"page_size {page_size}: impl 'triton' takes one of {PAGE_SIZES}"
    )
    group = heads // kv_heads
    input_class = InputClass.of(
        plan, group, dim, fp8=pages.fp8, invariant=batch_invariant, fused=fused
    )
    max_group = max(input_class.large, input_class.small)
    check(
        group <= max_group,
        f"{group} query heads per KV head: impl 'triton' takes at most {max_group}",
    )
    config = input_class.choose(q.device)
    configs = [config]
    if config["split"] and input_class.large and input_class.small:
        check(bool(config["pieces"]), "kernel config: split needs pieces")
        configs.append(input_class.choose_small(q.device))
    for launch_config in configs:
        whole = config["grain"] % min(launch_config["block"], page_size) == 0
        check(
            whole or not launch_config["tma"],
            "kernel config: with tma, grain must be a multiple of block",
        )
        token_heads = pages.num_pages * kv_heads * page_size  # rows for TMA, whose row is int32
        check(
            token_heads <= INT32_END or not launch_config["tma"],
            f"kernel config: tma takes pages of at most 2^31 tokens x KV heads, not {token_heads}",
        )
    sms = gpu_of(q.device).sms
    spec = ScheduleSpec(
        kv_heads=kv_heads,
        group=group,
        sizes=(input_class.large, input_class.small),
        grain=config["grain"],
        overhead=0 if batch_invariant else config["overhead"],
        programs=sms * config["programs"],
        window=window,
        invariant=batch_invariant,
        pieces=bool(config["pieces"]),
        small_programs=sms * configs[1]["programs"] if len(configs) > 1 else 0,
    )
    return spec, configs


def launch(
    q: Tensor,
    pages: KVPages,
    plan: PrefixPlan,
    spec: ScheduleSpec,
    configs: list[KernelConfig],
    scale: float,
    rotary: Rotary | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and merge; the first use of a plan also computes its schedule.

    q: [T, Hq, D], or with `rotary` the projection [T, (Hq + 2 Hkv) * D]
    spec, configs: from `plan_launch`
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
    both = {  # arguments of both kernels
        "out": out,
        "lse": lse,
        "part_out": q.new_empty(vectors, dim, dtype=torch.float32),
        "part_lse": q.new_empty(vectors, dtype=torch.float32),
        "KV_HEADS": spec.kv_heads,
        "GROUP": spec.group,
        "D": dim,
        "INVARIANT": spec.invariant,
        **pdl_options(configs[0], q.device),
        **schedule.line,
    }
    for number, config in enumerate(configs):
        sizes = spec.sizes
        if len(configs) > 1:
            sizes = (0, spec.sizes[1]) if number else (spec.sizes[0], 0)
        programs = spec.programs_of(number)
        block = min(config["block"], plan.page_size)
        faults = faults_of(programs, q.device)
        prefix_attention_kernel[(programs,)](
            q=q,
            **_pages(pages, block if config["tma"] else 0),
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
            NATIVE_FP8=has_native_e4m3(q.device),
            faults=(*faults, len(schedule.pieces)) if faults else (),
            **_config_args(config, spec, fp8=pages.fp8),
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


def _config_args(config: KernelConfig, spec: ScheduleSpec, *, fp8: bool) -> dict[str, bool | int]:
    """The kernel's arguments and options that its config determines."""
    return {
        "TMA": bool(config["tma"]),
        "PIECES": spec.pieces,
        "AHEAD": bool(config["ahead"]),
        # Not with both: the order of blocks would depend on the windows of other rows.
        "STEADY": bool(config["steady"] and not (spec.invariant and spec.window)),
        "HALF": fp8 and bool(config["fp16"]),
        "num_warps": config["num_warps"],
        "num_stages": config["num_stages"],
    }


def _pages(pages: KVPages, block: int) -> dict:
    """The kernel's arguments for K and V; if `block` is not 0, with descriptors for TMA."""
    kv = pages.as_bytes()
    return {
        "kv": kv,
        "k_blocks": _descriptor(kv.k, block) if block else None,
        "v_blocks": _descriptor(kv.v, block) if block else None,
    }


def _descriptor(pages: Tensor, block: int) -> TensorDescriptor:
    """A descriptor of [block, head_dim]: `block` tokens of one head within a page."""
    dim = pages.shape[-1]
    return TensorDescriptor.from_tensor(pages.view(-1, dim), [block, dim])
