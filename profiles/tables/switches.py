"""docs/kernel_switches.md's tables: what the compiler makes of a switch's old and its new form."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from model.errors import InputError
from profiles.tables.kernels import (
    ARCHS,
    ATTENTION,
    FIGURES,
    LAYER_NORM,
    MERGE,
    PREFIX_KINDS,
    RMS_NORM,
    ROTATION,
    SILU_MUL,
    VISION_ATTENTION,
    Kernel,
    chosen,
)
from profiles.tables.markdown import Row, markdown
from profiles.tables.readme import STATIC, recorded


class Switch(NamedTuple):
    """Lines of a table, one for each of `archs`: two rows whose configurations differ in it alone.

    `config` is a Kernel's; words of the same name as one of `old` and `new` give way to these.
    """

    label: str
    kernel: str
    config: str
    old: str
    new: str
    archs: tuple[int, ...] = ARCHS


def _loops(name: str, unit: int = 1) -> Callable[[Row], str]:
    """The figures of all hot loops, in the order of the text."""

    def text(row: Row) -> str:
        values = row[name] or [None]
        return ", ".join("-" if value is None else f"{value / unit:.0f}" for value in values)

    return text


LOOPS: dict[str, Callable[[Row], object]] = {
    " buffers": _loops("buffers"),
    " `async_wait`": _loops("async_wait"),
    " KB in flight": _loops("bytes_in_flight", 1024),
    " barriers": _loops("barriers"),
    " instructions per block": _loops("instructions_per_block"),
}
BOTH = FIGURES | LOOPS
WGMMA = {"wgmma": lambda row: "yes" if row["wgmma"] else "no"}
PDL = "PDL=0", "PDL=1 launch_pdl=True"


def switch_table(
    switches: Iterable[Switch], figures: dict[str, Callable[[Row], object]], baseline: Sequence[Row]
) -> str:
    """A line per switch and architecture: "old -> new", or the figure that both forms have."""
    lines = []
    for switch in switches:
        for arch in switch.archs:
            old, new = both_forms(switch, arch, baseline)
            changes = [_change(figure(old), figure(new)) for figure in figures.values()]
            lines.append([switch.label, f"sm_{arch}", *changes])
    return markdown(("kernel in bf16", "for", *figures), lines)


def both_forms(switch: Switch, arch: int, baseline: Sequence[Row]) -> tuple[Row, Row]:
    """The rows of the old and of the new form.

    Raises InputError unless there is exactly one of each, and they differ in the switch's words
    alone.
    """
    forms = switch.old.split(), switch.new.split()
    names = {_name(word) for form in forms for word in form}
    rest = [word for word in switch.config.split() if _name(word) not in names]
    found = [
        chosen(Kernel(switch.label, switch.kernel, " ".join([*rest, *form])), arch, baseline)
        for form in forms
    ]
    old, new = ({*row["config"].split()} - {*form} for row, form in zip(found, forms, strict=True))
    if old != new:
        raise InputError(
            f"{switch.kernel} on sm_{arch}, {switch.label}: more than {switch.old} ->"
            f" {switch.new} differs: {' '.join(sorted(old ^ new))}"
        )
    return found[0], found[1]


def _name(word: str) -> str:
    """AHEAD of "AHEAD=1" and of "90:AHEAD=1"."""
    return word.split(":")[-1].split("=")[0]


def _change(old: object, new: object) -> str:
    return f"{old}" if old == new else f"{old} -> {new}"


def _of_attention(old: str, new: str, kinds: Iterable[str] = PREFIX_KINDS) -> list[Switch]:
    return [Switch(kind, ATTENTION, PREFIX_KINDS[kind], old, new) for kind in kinds]


def _where_it_fits(old: str, new: str, kinds: Iterable[str] = PREFIX_KINDS) -> list[Switch]:
    """Without those forms that are no candidate on sm_90, as they would spill there."""
    return [
        switch._replace(archs=(80,)) if "fused, FP8" in switch.label else switch
        for switch in _of_attention(old, new, kinds)
    ]


def _fp16() -> list[Switch]:
    kinds = [kind for kind in PREFIX_KINDS if "FP8" in kind]
    return _where_it_fits("AHEAD=0 HALF=0", "AHEAD=0 HALF=1", kinds)


def _pdl() -> list[Switch]:
    attention = [switch._replace(archs=(90,)) for switch in _of_attention(*PDL)]
    return [*attention, Switch("merge", "merge_kernel", MERGE, *PDL, archs=(90,))]


SOME, MANY = PREFIX_KINDS["16 rollouts"], PREFIX_KINDS["64 rollouts"]
SPLIT = (  # one launch against each of two, of which the second is as for up to 4 rollouts
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
        "the same, 64 queries at a time",
        "vision_attention_kernel",
        VISION_ATTENTION.replace("ROWS=128", "ROWS=64 num_warps=4"),
        "TURN_Q=0",
        "TURN_Q=1",
        archs=(90,),
    ),
    Switch("its rotation", "rotate_kernel", ROTATION, "TURN_Q=0", "TURN_Q=1", archs=(90,)),
)
NORMS = (
    Switch("`rms_norm`, 4,096 wide", "rms_norm_kernel", RMS_NORM, *PDL, archs=(90,)),
    Switch("`layer_norm`, 1,536 wide", "layer_norm_kernel", LAYER_NORM, *PDL, archs=(90,)),
)
SILU = (Switch("`silu_mul`", "silu_mul_kernel", SILU_MUL, "INTERLEAVED=0", "INTERLEAVED=1"),)
PIECES = "PIECES=0 -pieces", "PIECES=1"
F2F = {" F2F": _loops("f2f"), " shared loads of 1 or 2 bytes": _loops("narrow_shared_loads")}


def _made(switches: Iterable[Switch], figures: dict[str, Callable[[Row], object]]) -> str:
    return switch_table(switches, figures, recorded(STATIC))


TABLES: dict[str, Callable[[], str]] = {
    "ahead": lambda: _made(_where_it_fits("AHEAD=0", "AHEAD=1"), BOTH),
    "steady": lambda: _made(_where_it_fits("STEADY=0", "STEADY=1"), BOTH),
    "pieces": lambda: _made(_of_attention(*PIECES), BOTH),
    "split": lambda: _made(SPLIT, BOTH | WGMMA),
    "fp16": lambda: _made(_fp16(), BOTH | F2F),
    "pdl of attention": lambda: _made(_pdl(), BOTH),
    "turn_q": lambda: _made(TURN_Q, BOTH | {" wgmma waits": _loops("wgmma_waits")}),
    "pdl of norms": lambda: _made(NORMS, FIGURES),
    "interleaved": lambda: _made(SILU, FIGURES),
}
