"""The tables of compiled kernels, from the static baseline, and the lookup of their rows."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from bench.rows.columns import Table, markdown
from model.errors import InputError
from profiles.tables.figures import Row

ARCHS = (90, 80)


class Kernel(NamedTuple):
    """A line: for each of `archs`, the one row whose config has all words of `config`.

    "!word" must be absent, and "90:word" is required on sm_90 only.
    """

    label: str
    kernel: str
    config: str
    archs: tuple[int, ...] = ARCHS


# The 10B's heads, no optional mode, and switches that no rule turns on.
HEADS = "KV_HEADS=8 GROUP=4 D=128 WINDOW=0 INVARIANT=0 TMA=0 PIECES=1 HALF=0 PDL=0"
BF16, FP8 = "-kv.k_scale -rotary", "!-kv.k_scale -rotary"
FUSED, FUSED_FP8 = "-kv.k_scale !-rotary", "!-kv.k_scale !-rotary"
SOME, MANY = "SIZES=(64,16) STEADY=0 num_stages=3", "SIZES=(128,16) STEADY=1 num_stages=5"
AHEAD_90, EIGHT_80 = "90:AHEAD=1 80:AHEAD=0", "90:num_warps=4 80:num_warps=8"
ATTENTION = "prefix_attention_kernel"
PREFIX_CONFIGS = {  # the configs that the rule chooses
    "up to 4 rollouts": f"{HEADS} {BF16} SIZES=(0,16) STEADY=0 AHEAD=1 num_warps=4 num_stages=3",
    "16 rollouts": f"{HEADS} {BF16} {SOME} {AHEAD_90} num_warps=4",
    "64 rollouts": f"{HEADS} {BF16} {MANY} AHEAD=1",
    "prefill": f"{HEADS} {BF16} SIZES=(128,0) STEADY=1 AHEAD=1 num_stages=5",
    "16 rollouts, FP8 KV": f"{HEADS} {FP8} {SOME} AHEAD=1 {EIGHT_80}",
    "64 rollouts, FP8 KV": f"{HEADS} {FP8} SIZES=(128,16) STEADY=0 AHEAD=1 num_stages=4",
    "16 rollouts, rotary fused": f"{HEADS} {FUSED} {SOME} AHEAD=1 {EIGHT_80}",
    "16 rollouts, rotary fused, FP8 KV": f"{HEADS} {FUSED_FP8} {SOME} AHEAD=0 {EIGHT_80}",
}
MERGE = "KV_HEADS=8 GROUP=4 D=128 INVARIANT=0 SPLIT=0 PDL=0 SIZES=(64,16)"
RMS_NORM = "!-residual ROWS=1 BLOCK=4096 PDL=0 num_warps=8"
LAYER_NORM = "!-residual ROWS=1 BLOCK=2048 PDL=0 num_warps=4"
SILU_MUL = "INTERLEAVED=0 BLOCK=256"
DECODE_KERNELS = (
    Kernel("`prefix_attention`, 16 rollouts", ATTENTION, PREFIX_CONFIGS["16 rollouts"]),
    Kernel(
        "`prefix_attention`, 16 rollouts, FP8 KV", ATTENTION, PREFIX_CONFIGS["16 rollouts, FP8 KV"]
    ),
    Kernel(
        "`prefix_attention`, 16 rollouts, rotary fused",
        ATTENTION,
        PREFIX_CONFIGS["16 rollouts, rotary fused"],
    ),
    Kernel("`prefix_attention`, 32 or more rollouts", ATTENTION, PREFIX_CONFIGS["64 rollouts"]),
    Kernel("merge of `prefix_attention`", "merge_kernel", MERGE),
    Kernel(
        "`qk_norm_rope`, up to 64 tokens",
        "qk_norm_rope_kernel",
        "-k_scale HEADS=32 HEAD_DIM=128 BLOCK_Q=4",
    ),
    Kernel("`rms_norm` with residual, 4,096 wide", "rms_norm_kernel", RMS_NORM),
    Kernel("`silu_mul`", "silu_mul_kernel", SILU_MUL),
    Kernel(
        "`sample`, scan of 151,936 logits",
        "sample_scan_kernel",
        "BLOCK=4096 GREEDY=0 TRUNCATED=0 TEMPERED=0 num_warps=8",
    ),
)
TOWER, GEMM = "HEADS=16 D=96", "BLOCK_M=128 BLOCK_N=256 TMA=0 num_stages=4"
VISION_ATTENTION = f"{TOWER} ROWS=128 BLOCK=64 TMA=0 TURN_Q=0 num_stages=3"
ROTATION = f"{TOWER} ROWS=32 TURN_Q=0"
VISION_KERNELS = (
    Kernel("`vision_attention`, heads of 96", "vision_attention_kernel", VISION_ATTENTION),
    Kernel(
        "`vision_attention`, warp-specialised, 128 x 128",
        "vision_attention_kernel",
        f"{TOWER} ROWS=128 BLOCK=128 SPECIALIZE=1",
        archs=(90,),
    ),
    Kernel("rotation of `vision_attention`", "rotate_kernel", ROTATION),
    Kernel(
        "`projector`, one convolution, 128 x 256", "gemm_kernel", f"{GEMM} C=1536 TAPS=9 -out_rows"
    ),
    Kernel("`linear_quick_gelu`, fused, 128 x 256", "gemm_kernel", f"{GEMM} C=1536 QUICK_GELU=1"),
    Kernel("`layer_norm` with residual, 1,536 wide", "layer_norm_kernel", LAYER_NORM),
)
FIGURES: dict[str, Callable[[Row], object]] = {
    " registers": lambda row: row["registers"],
    " bytes spilled": lambda row: row["spill_bytes"],
    " shared KB": lambda row: round(row["shared_bytes"] / 1024),
    " CTAs per SM": lambda row: row["programs_per_sm"],
}


def kernel_table(kernels: Sequence[Kernel], baseline: Sequence[Row]) -> str:
    """A line per kernel in bf16; each cell has the figures of sm_90 and sm_80."""
    lines = []
    for kernel in kernels:
        rows = [find_row(kernel, arch, baseline) for arch in kernel.archs]
        figures = [_per_arch(map(figure, rows)) for figure in FIGURES.values()]
        wgmma = "yes" if rows[0]["wgmma"] else "no"
        lines.append([kernel.label, *figures, wgmma, _loads(rows)])
    header = ("kernel in bf16, sm_90 / sm_80", *FIGURES, "wgmma", " 16-byte loads")
    return markdown(Table("", header, lines))


def find_row(kernel: Kernel, arch: int, baseline: Sequence[Row]) -> Row:
    """The row of a line. Raises InputError unless exactly one matches."""
    rows = [
        row
        for row in baseline
        if row["kernel"] == kernel.kernel
        and (row["arch"], row["dtype"]) == (arch, "bfloat16")
        and all(_matches(word, arch, row["config"].split()) for word in kernel.config.split())
    ]
    if len(rows) != 1:
        raise InputError(
            f"{kernel.kernel} on sm_{arch}: {len(rows)} rows of the static baseline match"
            f" {kernel.config!r}; a table needs exactly one"
        )
    return rows[0]


def _matches(word: str, arch: int, config: Sequence[str]) -> bool:
    if word.startswith("!"):
        return word[1:] not in config
    of_arch, colon, rest = word.partition(":")
    return int(of_arch) != arch or rest in config if colon else word in config


def _per_arch(figures: Iterable[object]) -> str:
    cells = [*map(str, figures)]
    return " / ".join(cells + ["-"] * (len(ARCHS) - len(cells)))


def _loads(rows: Sequence[Row]) -> str:
    """The share of loads that are 16 bytes wide; "TMA" where all loads are tensor copies."""
    if rows[0]["wide_loads"] is None:
        return "TMA"
    return _per_arch(f"{100 * row['wide_loads']:.0f}" for row in rows) + " %"
