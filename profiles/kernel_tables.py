"""README's tables of compiled kernels, from the static baseline."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from model.terminal import InputError
from profiles.markdown import Row, markdown

ARCHS = (90, 80)


class Kernel(NamedTuple):
    """A line: the one row of each of `archs` that has all words of `config` in its own.

    "!word" must not be in it, and "90:word" must be for sm_90.
    """

    label: str
    kernel: str
    config: str
    archs: tuple[int, ...] = ARCHS


HEADS = "KV_HEADS=8 GROUP=4 D=128 WINDOW=0 INVARIANT=0 TMA=0"  # the 10B's, and no mode
FEW, MANY = f"{HEADS} SIZES=(64,16) num_stages=3", f"{HEADS} SIZES=(128,16) num_stages=5"
DECODE_KERNELS = (
    Kernel(
        "`prefix_attention`, 16 rollouts",
        "prefix_attention_kernel",
        f"{FEW} -kv.k_scale -row_position -rotary num_warps=4",
    ),
    Kernel(
        "the same, FP8 KV",
        "prefix_attention_kernel",
        f"{FEW} !-kv.k_scale -row_position -rotary 90:num_warps=4 80:num_warps=8",
    ),
    Kernel(
        "the same, rotary fused",
        "prefix_attention_kernel",
        f"{FEW} -kv.k_scale -row_position !-rotary 90:num_warps=4 80:num_warps=8",
    ),
    Kernel(
        "32 and more rollouts",
        "prefix_attention_kernel",
        f"{MANY} -kv.k_scale -row_position -rotary",
    ),
    Kernel("its merge", "merge_kernel", "KV_HEADS=8 GROUP=4 D=128 INVARIANT=0 SIZES=(64,16)"),
    Kernel(
        "`qk_norm_rope`, up to 64 tokens",
        "qk_norm_rope_kernel",
        "-k_scale HEADS=32 HEAD_DIM=128 BLOCK_Q=4",
    ),
    Kernel(
        "`rms_norm` with residual, 4,096 wide",
        "rms_norm_kernel",
        "!-residual ROWS=1 BLOCK=4096 !PDL=1 num_warps=8",
    ),
    Kernel("`silu_mul`", "silu_mul_kernel", "BLOCK=256"),
    Kernel(
        "`sample`, scan of 151,936 logits",
        "sample_scan_kernel",
        "BLOCK=4096 GREEDY=0 TRUNCATED=0 TEMPERED=0 num_warps=8",
    ),
)
TOWER, GEMM = "HEADS=16 D=96", "BLOCK_M=128 BLOCK_N=256 TMA=0 num_stages=4"
VISION_KERNELS = (
    Kernel(
        "`vision_attention`, heads of 96",
        "vision_attention_kernel",
        f"{TOWER} ROWS=128 BLOCK=64 TMA=0 !TURN_Q=1 num_stages=3",
    ),
    Kernel(
        "the same, specialised, 128 x 128",
        "vision_attention_kernel",
        f"{TOWER} ROWS=128 BLOCK=128 SPECIALIZE=1",
        archs=(90,),
    ),
    Kernel("its rotation", "rotate_kernel", f"{TOWER} ROWS=32 !TURN_Q=1"),
    Kernel(
        "`projector`, a convolution, 128 x 256", "gemm_kernel", f"{GEMM} C=1536 TAPS=9 -out_rows"
    ),
    Kernel("`linear_quick_gelu`, fused, 128 x 256", "gemm_kernel", f"{GEMM} C=1536 QUICK_GELU=1"),
    Kernel(
        "`layer_norm` with residual, 1,536 wide",
        "layer_norm_kernel",
        "!-residual ROWS=1 BLOCK=2048 !PDL=1 num_warps=4",
    ),
)
FIGURES: dict[str, Callable[[Row], object]] = {
    " registers": lambda row: row["registers"],
    " spilled bytes": lambda row: row["spill_bytes"],
    " shared KB": lambda row: round(row["shared_bytes"] / 1024),
    " programs per SM": lambda row: row["programs_per_sm"],
}


def kernel_table(kernels: Sequence[Kernel], baseline: Sequence[Row]) -> str:
    """A line per kernel in bf16, figures of sm_90 and sm_80 side by side."""
    lines = []
    for kernel in kernels:
        found = [chosen(kernel, arch, baseline) for arch in kernel.archs]
        figures = [_beside(map(figure, found)) for figure in FIGURES.values()]
        wgmma = "yes" if found[0]["wgmma"] else "no"
        lines.append([kernel.label, *figures, wgmma, _loads(found)])
    header = ("kernel in bf16, sm_90 / sm_80", *FIGURES, "wgmma", " loads of 16 bytes")
    return markdown(header, lines)


def chosen(kernel: Kernel, arch: int, baseline: Sequence[Row]) -> Row:
    """The row of a line; raises InputError unless there is exactly one."""
    found = [
        row
        for row in baseline
        if row["kernel"] == kernel.kernel
        and (row["arch"], row["dtype"]) == (arch, "bfloat16")
        and all(_holds(word, arch, row["config"].split()) for word in kernel.config.split())
    ]
    if len(found) != 1:
        raise InputError(
            f"{kernel.kernel} on sm_{arch}: {len(found)} rows of the static baseline have"
            f" {kernel.config!r}; a table of README.md needs one"
        )
    return found[0]


def _holds(word: str, arch: int, config: Sequence[str]) -> bool:
    if word.startswith("!"):
        return word[1:] not in config
    of_arch, colon, rest = word.partition(":")
    return int(of_arch) != arch or rest in config if colon else word in config


def _beside(figures: Iterable[object]) -> str:
    cells = [*map(str, figures)]
    return " / ".join(cells + ["-"] * (len(ARCHS) - len(cells)))


def _loads(found: Sequence[Row]) -> str:
    """Percentages; "TMA" where all loads are tensor copies."""
    if found[0]["wide_loads"] is None:
        return "TMA"
    return _beside(f"{100 * row['wide_loads']:.0f}" for row in found) + " %"
