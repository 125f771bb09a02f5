"""What the pictures of measured rows share: markers of forms, units, sizes, saving.

Colours are Okabe and Ito's, which colour-blind people can tell apart; each comes with a marker or
hatch, for print. Ours is always vermillion and filled, eager always a hollow grey circle.
"""

from collections.abc import Iterable, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from bench.report.rows import role
from model.text.files import check_target
from pacore_sched.sim.plots import DPI, pyplot

WIDTH, MAX_HEIGHT = 7.6, 9.4  # of a page, in inches
INK, GRID = "#333333", "#d9d9d9"
OURS, EAGER = "#D55E00", "#666666"
BLUE, SKY, GREEN, PINK, ORANGE = "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00"
OUR_MARKERS = {"triton": "D", "default": "D", "portable": "s"}
MODE_MARKERS = "^v<>"  # of our other forms, in a lighter colour
BROWN, WINE, BLACK = "#8C6D1F", "#882255", "#000000"
PEER_COLOURS = {  # by the first word of the peer's name
    **dict.fromkeys(("sdpa", "cudnn", "liger"), BLUE),
    **dict.fromkeys(("flex", "compile", "torch"), GREEN),
    **{"flashinfer": PINK, "fa2": BLACK, "fa3": SKY, "fasttree": WINE},
}
PEER_MARKERS = {  # by the second word; hollow if there is a third, "alone"
    **{"": "o", "copied": "v", "cascade": "^", "folded": "P"},
    **{"flash": "X", "cudnn": "*", "efficient": "p", "varlen": "h"},
}
STYLE = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "hatch.linewidth": 0.6,
}


def panels(rows: int, columns: int, height: float, **options: Any) -> tuple[Any, Any]:  # noqa: ANN401
    """A figure of the page's width and its axes, a rows x columns array."""
    plt = pyplot()
    plt.rcdefaults()
    plt.rcParams.update(STYLE)
    return plt.subplots(
        rows, columns, figsize=(WIDTH, height), squeeze=False, layout="constrained", **options
    )


def save(figure: Any, path: Path) -> Path:  # noqa: ANN401
    """Write a picture and close its figure."""
    check_target(path)
    figure.savefig(path, dpi=DPI)
    pyplot().close(figure)
    return path


def marker_style(row: dict) -> dict:
    """Arguments of `plot` for the form of a row: colour, marker, filled or hollow, size."""
    form_role, name = role(row), row["impl"]
    if form_role == "eager":
        return {"color": EAGER, "marker": "o", "markerfacecolor": "white", "markersize": 5.5}
    if form_role == "peer":
        family, kind, alone = (*name.split("-", 2), "", "")[:3]
        style = {"color": PEER_COLOURS.get(family, BROWN), "marker": PEER_MARKERS.get(kind, "d")}
        return style | {"markersize": 5.5} | ({"markerfacecolor": "white"} if alone else {})
    if name in OUR_MARKERS:
        return {"color": OURS, "marker": OUR_MARKERS[name], "markersize": 7}
    marker = MODE_MARKERS[sum(map(ord, name)) % len(MODE_MARKERS)]
    return {"color": ORANGE, "marker": marker, "markersize": 6, "markeredgecolor": OURS}


def drawing_order(rows: Iterable[dict]) -> list[dict]:
    """Eager first, then peers, then ours; otherwise in the given order."""
    return sorted(rows, key=lambda row: ("eager", "peer", "ours").index(role(row)))


def legend(figure: Any, rows: Sequence[dict]) -> None:  # noqa: ANN401
    """A legend of the rows' forms, above the panels."""
    from matplotlib.lines import Line2D

    forms = {row["impl"]: row for row in drawing_order(rows)}
    handles = [
        Line2D([], [], linestyle="", label=f"{name} (ours)" if role(row) == "ours" else name)
        for name, row in forms.items()
    ]
    for handle, row in zip(handles, forms.values(), strict=True):
        handle.set(**marker_style(row))
    figure.legend(handles=handles, loc="outside upper left", ncols=5, columnspacing=1.2)


def format_number(value: float, _: object = None) -> str:
    """A number with three digits and no exponent: "4,000", "0.192"."""
    return f"{float(f'{value:.3g}'):,.12g}"


def format_duration(us: float, _: object = None) -> str:
    """Microseconds in a readable unit: "20 µs", "1.5 ms"."""
    if not us:
        return "0"
    for size, unit in ((1e6, "s"), (1e3, "ms"), (1, "µs")):
        if us >= size:
            return f"{format_number(us / size)} {unit}"
    return f"{us * 1e3:.3g} ns"


def times_axis(axis: Any, lowest: float, highest: float) -> None:  # noqa: ANN401
    """Make `axis` a logarithmic axis of microseconds with two to five labelled ticks."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.axes.set(**{f"{axis.axis_name}lim": (lowest / 1.3, highest * 1.3)})
    axis.set_major_locator(FixedLocator(round_ticks(lowest / 1.3, highest * 1.3)))
    axis.set_major_formatter(FuncFormatter(format_duration))
    axis.set_minor_formatter(NullFormatter())


def round_ticks(low: float, high: float, max_ticks: int = 5) -> list[float]:
    """Two to `max_ticks` round values from `low` to `high`, which must not be too close: halves,
    digits or decades."""
    halves = [half / 2 for half in range(2, 20)]
    ticks: list[float] = []
    for digits in (halves, range(1, 10), (1, 2, 5), (1, 3), (1,)):
        coarser = [d * 10.0**e for e in range(-6, 16) for d in digits if low <= d * 10.0**e <= high]
        if len(coarser) < 2:
            break
        ticks = coarser
        if len(ticks) <= max_ticks:
            return ticks
    return ticks[:: ceil(len(ticks) / max_ticks) or 1]
