"""The benchmark cases of every op as data: inputs, minimum bytes to move, useful operations.

`cases` are the shapes that the model runs, at a size that fits the device; `numerics_cases` are
small and awkward, to check results in every dtype.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from bench import cost, forests, inputs
from bench.inputs import Node, fork
from bench.peers import peers_on
from bench.vision import attention_flops, projector_flops, views_of
from kernels.activation import quick_gelu, silu_mul
from kernels.linear_quick_gelu import linear_quick_gelu
from kernels.norm import layer_norm, rms_norm
from kernels.prefix_attention import prefix_attention
from kernels.projector import output_tokens, projector
from kernels.qk_norm_rope import qk_norm_rope
from kernels.rotary_attention import rotary_attention
from kernels.runtime.grids import Grid, tokens_of
from kernels.sampling import sample
from kernels.vision_attention import vision_attention
from model.config import PRESETS, Config

OPS: dict[str, Callable] = {
    "prefix_attention": prefix_attention,
    "rotary_attention": rotary_attention,
    "qk_norm_rope": qk_norm_rope,
    "rms_norm": rms_norm,
    "silu_mul": silu_mul,
    "sample": sample,
    "vision_attention": vision_attention,
    "layer_norm": layer_norm,
    "quick_gelu": quick_gelu,
    "linear_quick_gelu": linear_quick_gelu,
    "projector": projector,
}
STORING = ("qk_norm_rope", "rotary_attention")  # ops that write K and V into pages

BIG, TINY = PRESETS["step3-vl-10b"], PRESETS["tiny"]
SMOLLM2 = PRESETS["smollm2-135m"]
DECODE_ROWS = (1, 16, 64, 256)
Heads = tuple[int, int, int]  # query heads, KV heads, head_dim
WIDE: Heads = (64, 1, 256)


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    At least `values` elements of the case's dtype and `fixed_bytes` of other types (FP8 pages and
    their scales) must cross the memory bus.
    """

    op: str
    name: str
    inputs: Callable[[int, torch.device, torch.dtype], dict]  # (seed, device, dtype) -> kwargs
    values: int
    flops: int
    peers: tuple[str, ...] = ()  # names in bench/peers
    fixed_bytes: int = 0
    modes: tuple[str, ...] = ()  # the Triton form's modes besides the fastest
    form: str = "triton"  # the Triton form's mode, set by `in_modes`

    def bytes(self, dtype: torch.dtype) -> int:
        return self.values * dtype.itemsize + self.fixed_bytes


def cases(device_type: str, grid: bool = False) -> list[Case]:
    """The op table's cases on a "cuda" or "cpu" device, the most informative first.

    With `grid`, prefix attention's grid of prefixes and suffixes follows.
    """
    main_cases, grid_cases = {"cpu": (_cpu_cases, _cpu_grid), "cuda": (_cuda_cases, _cuda_grid)}[
        device_type
    ]
    listed = [*main_cases(), *grid_cases()] if grid else [*main_cases()]
    return [replace(case, peers=peers_on(device_type, case.op)) for case in listed]


def _cuda_cases() -> Iterator[Case]:
    for name, forest in forests.main_forests():
        yield _prefix(name, forest)
    for point in ((16, 2048, 512), (32, 4096, 512)):
        name, forest = forests.rollouts(*point)
        yield _prefix(f"{name} fp8", forest, fp8=True)
        yield _prefix(f"{name} window 512", forest, window=512)
        yield _prefix(f"{name} 64/1 heads of 256", forest, heads=WIDE)
    yield _prefix("B32 P4096 S512 fp8 window 512", forest, fp8=True, window=512)
    for batch, prefix, suffix in ((16, 2048, 512), (64, 8192, 1024), (1, 2048, 512)):
        yield _rotary(f"B{batch} P{prefix} S{suffix}", [fork(prefix, [suffix] * batch)])
    yield _prefix("prefill 2048", [Node(2048, new=2048)])
    yield _prefix("prefill 2048 behind 8192", [Node(10240, new=2048)])
    yield _prefix("prefill 2048 behind 8192 fp8", [Node(10240, new=2048)], fp8=True)
    for rows in (*DECODE_ROWS, 4096):
        yield _qk_norm_rope(rows)
        yield _rms_norm(rows, BIG.decoder.hidden)
        yield _silu_mul(rows, BIG.decoder.mlp_width)
    yield _silu_mul(16, BIG.decoder.mlp_width, interleaved=True)
    yield _silu_mul(4096, BIG.decoder.mlp_width, interleaved=True)
    yield _sample(64, BIG.decoder.vocab_size)
    yield _sample(64, BIG.decoder.vocab_size, top_k=20, top_p=0.95)
    yield from _cuda_vision_cases()


def _cuda_vision_cases() -> Iterator[Case]:
    """One view of each size, and photos up to the largest that is not downscaled."""
    vision, out = BIG.vision, BIG.decoder.hidden
    global_view, crop = [(vision.grid,) * 2], [(vision.crop_size // vision.patch_size,) * 2]
    photo, square, largest = (
        views_of(*size, vision) for size in ((1920, 1080), (2016, 2016), (3024, 3024))
    )
    for grids in (global_view, photo):
        rows = tokens_of(grids)
        yield _layer_norm(rows, vision.width)
        yield _quick_gelu(rows, vision.mlp_width)
        yield _linear_quick_gelu(rows, vision.width, vision.mlp_width)
    for grids in (photo, global_view, crop, largest, 4 * global_view):
        yield _vision(grids, vision.heads)
    for grids in (photo, global_view, crop, square, largest):
        yield _projector(grids, vision.width, out)
    yield _projector(photo, vision.width, out, scattered=True)


def _cuda_grid() -> Iterator[Case]:
    for name, forest in forests.grid():
        yield _prefix(name, forest)
    name, forest = forests.rollouts(64, 8192, 1024)
    yield _prefix(f"{name} fp8", forest, fp8=True)


def _cpu_grid() -> Iterator[Case]:
    for point in forests.CPU_GRID:
        name, forest = forests.rollouts(*point)
        yield _prefix(f"smollm2 {name}", forest, heads=_heads(SMOLLM2))


def _cpu_cases() -> Iterator[Case]:
    yield _prefix("B16 P2048 S128", [fork(2048, [128] * 16)])
    yield _rotary("B16 P2048 S128", [fork(2048, [128] * 16)])
    yield _prefix("4 x (B4 P512 S64)", [fork(512, [64] * 4)] * 4)
    forest = [fork(1500, [64] * 16)]
    yield _prefix("smollm2 B16 P1500 S64", forest, heads=_heads(SMOLLM2))
    yield _prefix("prefill 128 behind 896", [Node(1024, new=128)])
    for rows in DECODE_ROWS:
        yield _qk_norm_rope(rows)
        yield _rms_norm(rows, BIG.decoder.hidden)
        yield _silu_mul(rows, BIG.decoder.mlp_width)
    yield _sample(16, SMOLLM2.decoder.vocab_size)
    yield _sample(16, SMOLLM2.decoder.vocab_size, top_k=20, top_p=0.95)
    vision = TINY.vision
    for grids in ([(36, 36)], [(8, 8)] * 4 + [(12, 12)]):
        yield _vision(grids, vision.heads)
        yield _projector(grids, vision.width, TINY.decoder.hidden)
    yield _layer_norm(1296, BIG.vision.width)
    yield _quick_gelu(324, BIG.vision.mlp_width)
    yield _linear_quick_gelu(324, BIG.vision.width, BIG.vision.mlp_width)


def in_modes(cases: Iterable[Case]) -> list[Case]:
    """Each case in every mode of the op's Triton form, to compile or tune all its kernels."""
    return [replace(case, form=form) for case in cases for form in ("triton", *case.modes)]


def numerics_cases() -> list[Case]:
    """Awkward shapes: one row, primes, partly filled tiles, ragged trees, empty nodes."""
    tree = Node(70, children=(Node(0, children=(Node(1, new=1), Node(129, new=2))), Node(64)))
    forest = [fork(130, [1, 63, 64, 65]), tree, Node(5, new=5), Node(100, new=37)]
    return [
        *(
            _prefix(name, forest, return_lse=True, **options)
            for name, options in {
                "ragged forest": {},
                "smollm2 ragged forest": {"heads": _heads(SMOLLM2)},
                "ragged forest fp8": {"fp8": True},
                "ragged forest window 70": {"window": 70},
                "64/1 heads of 256, fp8, window 70": {"heads": WIDE, "fp8": True, "window": 70},
            }.items()
        ),
        _rotary("ragged decode", [fork(130, [1, 63, 64, 65]), Node(100, new=1)]),
        _rotary("smollm2 ragged decode", [fork(70, [1, 9, 2, 33, 64, 5])], heads=_heads(SMOLLM2)),
        _qk_norm_rope(67, skip=3),
        _qk_norm_rope(5, SMOLLM2.name),
        _rms_norm(7, 4096),
        _rms_norm(1, 97, residual=False),
        _silu_mul(7, 12288),
        _silu_mul(1, 97),
        _silu_mul(7, 97, interleaved=True),
        _sample(3, 151936),
        _sample(17, 997, top_k=5, top_p=0.9),
        _sample(5, 9973, temperature=0.6, logprobs="processed"),
        _sample(17, 997, temperature=1.3, top_k=5, top_p=0.9, logprobs="processed"),
        _vision([(5, 7), (5, 7), (8, 3)], heads=2),
        _vision([(1, 1), (9, 15), (1, 13)], heads=3),
        *(_vision([(11, 6), (2, 1)], heads=1, head_dim=dim) for dim in (64, 72, 80, 128)),
        _layer_norm(7, 1536),
        _layer_norm(1, 97, residual=False),
        _quick_gelu(7, 8960),
        _linear_quick_gelu(7, 1536, 8960),
        _linear_quick_gelu(131, 72, 200),
        _linear_quick_gelu(1, 8, 8),
        _projector([(5, 7), (4, 4), (4, 4)], width=24, out=40),
        _projector([(1, 1), (13, 9), (1, 6)], width=40, out=72),
        _projector([(6, 5), (3, 8)], width=24, out=40, scattered=True),
    ]


def _heads(model: Config) -> Heads:
    return model.decoder.heads, model.decoder.kv_heads, model.decoder.head_dim


def _prefix(
    name: str,
    forest: Sequence[Node],
    *,
    heads: Heads | None = None,
    peers: tuple[str, ...] = (),
    **options: object,
) -> Case:
    """`options` go to the inputs: window, fp8, return_lse."""
    q_heads, kv_heads, dim = heads or _heads(BIG)
    shape = {"heads": q_heads, "kv_heads": kv_heads, "head_dim": dim}
    fp8 = options.get("fp8", False)
    tokens, pairs = _visible(forest, options.get("window", 0))
    q = sum(root.rows for root in forest) * q_heads * dim
    kv = 2 * tokens * kv_heads
    return Case(
        op="prefix_attention",
        name=name,
        inputs=partial(inputs.prefix_attention_inputs, forest=tuple(forest), **shape, **options),
        values=2 * q + (0 if fp8 else kv * dim),
        fixed_bytes=kv * (dim + 4) if fp8 else 0,
        flops=4 * pairs * q_heads * dim,
        peers=peers,
        modes=("triton-invariant",),
    )


def _rotary(name: str, forest: Sequence[Node], heads: Heads | None = None) -> Case:
    """A decode step's rotary attention: attention's traffic, with the projection instead of Q."""
    attention = _prefix(name, forest, heads=heads)
    q_heads, kv_heads, dim = heads or _heads(BIG)
    shape = {"heads": q_heads, "kv_heads": kv_heads, "head_dim": dim}
    rows = sum(root.rows for root in forest)
    return Case(
        op="rotary_attention",
        name=name,
        inputs=partial(inputs.rotary_attention_inputs, forest=tuple(forest), **shape),
        # The new K and V are read from the projection and written to pages.
        values=attention.values + 2 * rows * kv_heads * dim + 2 * dim,
        flops=attention.flops + 7 * rows * (q_heads + kv_heads) * dim,
        modes=("triton-separate",),
    )


def _visible(forest: Sequence[Node], window: int) -> tuple[int, int]:
    """How many tokens are seen by any row, and how many (row, seen token) pairs there are."""
    if window:
        shared, _, pairs = cost.tokens(inputs.prefix_plan(0, "cpu", forest=forest), window)
        return shared, pairs
    nodes = [node for root in forest for node in root.walk() if node.rows]
    pairs = sum(node.rows * node.tokens - node.new * (node.new - 1) // 2 for node in nodes)
    return sum(node.tokens for node in nodes), pairs  # a new token does not see later ones


def _qk_norm_rope(rows: int, preset: str = BIG.name, skip: int = 0) -> Case:
    config = PRESETS[preset].decoder
    shape = {"heads": config.heads, "kv_heads": config.kv_heads, "head_dim": config.head_dim}
    rotated = rows * (config.heads + config.kv_heads) * config.head_dim
    return Case(
        op="qk_norm_rope",
        name=f"T{rows} {config.heads}/{config.kv_heads} heads of {config.head_dim}",
        inputs=partial(inputs.qk_norm_rope_inputs, rows=rows, skip=skip, **shape),
        values=2 * (rotated + rows * config.kv_heads * config.head_dim) + 2 * config.head_dim,
        flops=7 * rotated,  # square, sum, scale, weight; two products and a sum of the rotation
    )


def _rms_norm(rows: int, width: int, residual: bool = True) -> Case:
    return Case(
        op="rms_norm",
        name=f"T{rows} C{width}" + ("" if residual else " alone"),
        inputs=partial(inputs.rms_norm_inputs, rows=rows, width=width, residual=residual),
        values=(4 if residual else 2) * rows * width + width,
        flops=5 * rows * width,
    )


def _layer_norm(rows: int, width: int, residual: bool = True) -> Case:
    return Case(
        op="layer_norm",
        name=f"T{rows} C{width}" + ("" if residual else " alone"),
        inputs=partial(inputs.layer_norm_inputs, rows=rows, width=width, residual=residual),
        values=(4 if residual else 2) * rows * width + (3 if residual else 2) * width,
        flops=8 * rows * width,
    )


def _silu_mul(rows: int, width: int, interleaved: bool = False) -> Case:
    shape = {"rows": rows, "width": width, "interleaved": interleaved}
    return Case(
        op="silu_mul",
        name=f"T{rows} F{width}" + (" interleaved" if interleaved else ""),
        inputs=partial(inputs.silu_mul_inputs, **shape),
        values=3 * rows * width,
        flops=5 * rows * width,
    )


def _quick_gelu(rows: int, width: int) -> Case:
    return Case(
        op="quick_gelu",
        name=f"T{rows} F{width}",
        inputs=partial(inputs.quick_gelu_inputs, rows=rows, width=width),
        values=2 * rows * width,
        flops=5 * rows * width,
    )


def _linear_quick_gelu(rows: int, width: int, out: int) -> Case:
    """Counts only the operations of the matrix product."""
    return Case(
        op="linear_quick_gelu",
        name=f"T{rows} C{width} F{out}",
        inputs=partial(inputs.linear_quick_gelu_inputs, rows=rows, width=width, out=out),
        values=rows * width + out * width + out + rows * out,
        flops=2 * rows * width * out,
        modes=("triton-fused",),
    )


def _sample(rows: int, vocab: int, **settings: float | str) -> Case:
    """`settings` are those of `sample`; they are part of the name in this order."""
    prefixes = {"temperature": "t", "top_k": "k", "top_p": "p", "logprobs": ""}
    parts = [f"{prefix}{settings[key]}" for key, prefix in prefixes.items() if key in settings]
    name = " ".join([f"B{rows} V{vocab}", *parts])
    return Case(
        op="sample",
        name=name,
        inputs=partial(inputs.sample_inputs, rows=rows, vocab=vocab, **settings),
        values=rows * vocab,
        flops=5 * rows * vocab,
    )


def _vision(grids: Sequence[Grid], heads: int, head_dim: int = 96) -> Case:
    width, shape = heads * head_dim, {"heads": heads, "head_dim": head_dim}
    return Case(
        op="vision_attention",
        name=f"{_views(grids)} H{heads} D{head_dim}",
        inputs=partial(inputs.vision_attention_inputs, grids=tuple(grids), **shape),
        values=4 * tokens_of(grids) * width,
        flops=attention_flops(grids, width),
    )


def _projector(
    grids: Sequence[Grid],
    width: int,
    out: int,
    scattered: bool = False,
) -> Case:
    """The minimum work is that of the folded weights: w2 and w3 need not be read."""
    shape = {"width": width, "out": out, "scattered": scattered}
    weights = 18 * width**2 + 18 * width * out
    end = sum(map(output_tokens, grids))
    return Case(
        op="projector",
        name=f"{_views(grids)} C{width}" + (" scattered" if scattered else ""),
        inputs=partial(inputs.projector_inputs, grids=tuple(grids), **shape),
        values=tokens_of(grids) * width + weights + 2 * width + out + end * out,
        flops=projector_flops(grids, width, out),
    )


def _views(grids: Sequence[Grid]) -> str:
    """The grids as text, such as "9x 36x36 + 1x 52x52"."""
    counts = {grid: list(grids).count(grid) for grid in grids}
    return " + ".join(f"{n}x {rows}x{columns}" for (rows, columns), n in counts.items())
