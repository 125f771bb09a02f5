"""The tables of docs/kernel_switches.md: both forms of every switch, as compiled."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from bench.rows.columns import Table, markdown
from model.errors import InputError
from profiles.tables.figures import Row
from profiles.tables.kernels import (
    ARCHS,
    ATTENTION,
    FIGURES,
    LAYER_NORM,
    MERGE,
    PREFIX_CONFIGS,
    RMS_NORM,
    ROTATION,
    SILU_MUL,
    VISION_ATTENTION,
    Kernel,
    find_row,
)
from profiles.tables.results import STATIC, recorded


class Switch(NamedTuple):
    """A line for each of `archs`: two rows whose configs differ only in this switch.

    `config` is as in Kernel; words of `old` and `new` replace its words of the same name.
    """

    label: str
    kernel: str
    config: str
    old: str
    new: str
    archs: tuple[int, ...] = ARCHS


def _loops(name: str, unit: int = 1) -> Callable[[Row], str]:
    """The figures of all hot loops, in the order of the code."""

    def text(row: Row) -> str:
        values = row[name] or [None]
        return ", ".join("-" if value is None else f"{value / unit:.0f}" for value in values)

    return text


LOOPS: dict[str, Callable[[Row], object]] = {
    " buffers": _loops("buffers"),
    " `async_wait`": _loops("async_wait"),
    " KB in flight": _loops("bytes_in_flight", 1024),
    " barriers": _loops("barriers"),
    " instructions per KV block": _loops("instructions_per_block"),
}
BOTH = FIGURES | LOOPS
WGMMA = {"wgmma": lambda row: "yes" if row["wgmma"] else "no"}
PDL = "PDL=0", "PDL=1 launch_pdl=True"


def switch_table(
    switches: Iterable[Switch], figures: dict[str, Callable[[Row], object]], baseline: Sequence[Row]
) -> str:
    """A line per switch and architecture: "old -> new", or one figure if both are equal."""
    lines = []
    for switch in switches:
        for arch in switch.archs:
            old, new = both_forms(switch, arch, baseline)
            changes = [_change(figure(old), figure(new)) for figure in figures.values()]
            lines.append([switch.label, f"sm_{arch}", *changes])
    return markdown(Table("", ("kernel in bf16", "arch", *figures), lines))


def both_forms(switch: Switch, arch: int, baseline: Sequence[Row]) -> tuple[Row, Row]:
    """The rows of the old and the new form.

    Raises InputError unless there is exactly one of each, and only the switch's words differ.
    """
    forms = switch.old.split(), switch.new.split()
    names = {_name(word) for form in forms for word in form}
    rest = [word for word in switch.config.split() if _name(word) not in names]
    rows = [
        find_row(Kernel(switch.label, switch.kernel, " ".join([*rest, *form])), arch, baseline)
        for form in forms
    ]
    old, new = ({*row["config"].split()} - {*form} for row, form in zip(rows, forms, strict=True))
    if old != new:
        raise InputError(
            f"{switch.kernel} on sm_{arch}, {switch.label}: the two forms differ in more than"
            f" {switch.old} -> {switch.new}: {' '.join(sorted(old ^ new))}"
        )
    return rows[0], rows[1]


def _name(word: str) -> str:
    """AHEAD of "AHEAD=1" and of "90:AHEAD=1"."""
    return word.split(":")[-1].split("=")[0]


def _change(old: object, new: object) -> str:
    return f"{old}" if old == new else f"{old} -> {new}"


def _of_attention(old: str, new: str, labels: Iterable[str] = PREFIX_CONFIGS) -> list[Switch]:
    return [Switch(label, ATTENTION, PREFIX_CONFIGS[label], old, new) for label in labels]


def _where_no_spill(old: str, new: str, labels: Iterable[str] = PREFIX_CONFIGS) -> list[Switch]:
    """Leaves out forms that are no candidates on sm_90 because they would spill there."""
    return [
        switch._replace(archs=(80,)) if "fused, FP8" in switch.label else switch
        for switch in _of_attention(old, new, labels)
    ]


def _fp16() -> list[Switch]:
    labels = [label for label in PREFIX_CONFIGS if "FP8" in label]
    return _where_no_spill("AHEAD=0 HALF=0", "AHEAD=0 HALF=1", labels)


def _pdl() -> list[Switch]:
    attention = [switch._replace(archs=(90,)) for switch in _of_attention(*PDL)]
    return [*attention, Switch("merge", "merge_kernel", MERGE, *PDL, archs=(90,))]


SOME, MANY = PREFIX_CONFIGS["16 rollouts"], PREFIX_CONFIGS["64 rollouts"]
SPLIT = (  # one launch compared with each of two; the second is that for up to 4 rollouts
    Switch("16 rollouts, large tiles", ATTENTION, SOME, "SIZES=(64,16)", "SIZES=(64,0)"),
    Switch(
        "16 rollouts, small tiles", ATTENTION, SOME, "SIZES=(64,16)", "SIZES=(0,16)", archs=(90,)
    ),
    Switch(
        "16 rollouts, small tiles",
        ATTENTION,
        SOME,
        "SIZES=(64,16) AHEAD=0",
        "SIZES=(0,16) AHEAD=1",
        archs=(80,),
    ),
    Switch("64 rollouts, large tiles", ATTENTION, MANY, "SIZES=(128,16)", "SIZES=(128,0)"),
    Switch(
        "64 rollouts, small tiles",
        ATTENTION,
        MANY,
        "SIZES=(128,16) STEADY=1 num_warps=8 num_stages=5",
        "SIZES=(0,16) STEADY=0 num_warps=4 num_stages=3",
    ),
    Switch("merge", "merge_kernel", MERGE, "SPLIT=0", "SPLIT=1"),
)
TURN_Q = (
    Switch(
        "`vision_attention`, heads of 96",
        "vision_attention_kernel",
        VISION_ATTENTION,
        "TURN_Q=0",
        "TURN_Q=1 maxnreg=128",
        archs=(90,),
    ),
    Switch(
        "`vision_attention`, heads of 96, 64 queries per tile",
        "vision_attention_kernel",
        VISION_ATTENTION.replace("ROWS=128", "ROWS=64 num_warps=4"),
        "TURN_Q=0",
        "TURN_Q=1",
        archs=(90,),
    ),
    Switch(
        "rotation of `vision_attention`",
        "rotate_kernel",
        ROTATION,
        "TURN_Q=0",
        "TURN_Q=1",
        archs=(90,),
    ),
)
NORMS = (
    Switch("`rms_norm`, 4,096 wide", "rms_norm_kernel", RMS_NORM, *PDL, archs=(90,)),
    Switch("`layer_norm`, 1,536 wide", "layer_norm_kernel", LAYER_NORM, *PDL, archs=(90,)),
)
SILU = (Switch("`silu_mul`", "silu_mul_kernel", SILU_MUL, "INTERLEAVED=0", "INTERLEAVED=1"),)
PIECES = "PIECES=0 -pieces", "PIECES=1"
F2F = {" F2F": _loops("f2f"), " shared loads of 1 or 2 bytes": _loops("narrow_shared_loads")}


def _table(switches: Iterable[Switch], figures: dict[str, Callable[[Row], object]]) -> str:
    return switch_table(switches, figures, recorded(STATIC))


TABLES: dict[str, Callable[[], str]] = {
    "ahead": lambda: _table(_where_no_spill("AHEAD=0", "AHEAD=1"), BOTH),
    "steady": lambda: _table(_where_no_spill("STEADY=0", "STEADY=1"), BOTH),
    "pieces": lambda: _table(_of_attention(*PIECES), BOTH),
    "split": lambda: _table(SPLIT, BOTH | WGMMA),
    "fp16": lambda: _table(_fp16(), BOTH | F2F),
    "pdl of attention": lambda: _table(_pdl(), BOTH),
    "turn_q": lambda: _table(TURN_Q, BOTH | {" wgmma waits": _loops("wgmma_waits")}),
    "pdl of norms": lambda: _table(NORMS, FIGURES),
    "interleaved": lambda: _table(SILU, FIGURES),
}
