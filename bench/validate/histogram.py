"""Error histograms: a picture per dtype, a panel per op, a line per form."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.validate.comparison import EDGES
from model.text.files import check_target
from pacore_sched.sim.plots import pyplot

COLUMNS, PANEL, DPI = 3, (4.6, 2.7), 110
ALL_EDGES = np.concatenate([[EDGES[0] / 2], EDGES, [EDGES[-1] * 2]])
# Forms often have the same errors: a thin line over a thick one leaves both visible.
STYLES = (
    {"linewidth": 5.0, "alpha": 0.35},
    {"linewidth": 1.8},
    {"linewidth": 1.3, "linestyle": "--"},
    {"linewidth": 1.3, "linestyle": ":"},
)


def draw(rows: Sequence[dict], folder: Path) -> list[Path]:
    """Write `errors-DTYPE.png` for each dtype of the rows that have a histogram against fp64."""
    rows = [row for row in rows if row.get("histogram") and row["reference"] == "fp64"]
    paths = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        paths.append(folder / f"errors-{dtype}.png")
        _picture([row for row in rows if row["dtype"] == dtype], dtype, paths[-1])
    return paths


def _picture(rows: Sequence[dict], dtype: str, path: Path) -> None:
    ops = list(dict.fromkeys(row["op"] for row in rows))
    forms = list(dict.fromkeys(row["impl"] for row in rows))
    columns = min(COLUMNS, len(ops))
    lines = math.ceil(len(ops) / columns)
    figure, panels = pyplot().subplots(
        lines,
        columns,
        squeeze=False,
        sharex=True,
        sharey=True,
        figsize=(max(2, columns) * PANEL[0], lines * PANEL[1] + 1.2),
        layout="constrained",
    )
    for op, axes in zip(ops, panels.flat, strict=False):
        _panel(axes, op, [row for row in rows if row["op"] == op], forms)
    for axes in panels.flat[len(ops) :]:
        axes.set_visible(False)
    for axes in panels.flat[max(0, len(ops) - columns) : len(ops)]:
        axes.xaxis.set_tick_params(labelbottom=True)
    figure.suptitle(f"errors against fp64, {dtype}, {rows[0]['device']}")
    figure.supxlabel("error in roundoffs of the result's dtype (first bin: below 1/16, or exact)")
    figure.supylabel("share of elements")
    check_target(path)
    figure.savefig(path, dpi=DPI)
    pyplot().close(figure)


def _panel(axes: Any, op: str, rows: Sequence[dict], forms: Sequence[str]) -> None:  # noqa: ANN401
    """A line per form, over all its cases, and the largest allowed error."""
    for number, form in enumerate(forms):
        counts = [row["histogram"] for row in rows if row["impl"] == form]
        if counts:
            total = np.sum(counts, axis=0)
            style = STYLES[number % len(STYLES)]
            axes.stairs(total / total.sum(), ALL_EDGES, color=f"C{number}", label=form, **style)
    limits = [r["max_allowed"] / r["roundoff"] for r in rows if r["max_allowed"]]
    if limits:
        axes.axvline(max(limits), color="black", linewidth=1, linestyle="-.", label="allowed")
    axes.set_title(op, loc="left", fontsize=10)
    axes.set(yscale="log", ylim=(1e-7, 2), xlim=(ALL_EDGES[0], ALL_EDGES[-1]))
    axes.set_xscale("log", base=2)
    axes.set_xticks(EDGES[::8], [_label(edge) for edge in EDGES[::8]])
    axes.minorticks_off()
    axes.legend(loc="upper right", fontsize=7, framealpha=0.8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _label(edge: float) -> str:
    return f"{edge:,.0f}" if edge >= 1 else f"1/{1 / edge:.0f}"
