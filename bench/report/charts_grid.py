"""Heat maps of prefix attention: our speed-up by prefix and suffix length."""

from collections.abc import Sequence
from math import ceil, floor, log2
from pathlib import Path
from typing import Any, NamedTuple

from bench.report.charts import INK, format_number, panels, save
from bench.report.rows import best, group_by
from bench.rows.shapes import shape_of

COLUMNS = 2  # of panels
BASES = {"eager": "eager", "peer": "the best peer"}


class Panel(NamedTuple):
    """Cases that differ only in prefix and suffix."""

    title: str
    prefixes: list[int]
    suffixes: list[int]
    cells: dict[tuple[int, int], float]  # (prefix, suffix) -> speed-up


def grids(rows: Sequence[dict], base: str) -> list[Panel]:
    """Speed-ups of our best form over the best form of role `base`, "eager" or "peer".

    A panel per batch, heads, window and dtype of KV with two points or more.
    """
    titles: dict[str, dict[tuple[int, int], float]] = {}
    for (op, _, dtype), forms in group_by(rows, "op", "case", "dtype").items():
        shape = shape_of(forms[0])
        ours, other = best(forms, "ours"), best(forms, base)
        if op == "prefix_attention" and "batch" in shape and ours and other:
            cells = titles.setdefault(", ".join([*_title(shape), dtype]), {})
            cells[shape["prefix"], shape["suffix"]] = other["median_us"] / ours["median_us"]
    return [
        Panel(title, sorted({p for p, _ in cells}), sorted({s for _, s in cells}), cells)
        for title, cells in titles.items()
        if len(cells) > 1
    ]


def _title(shape: dict) -> list[str]:
    """What the points of a panel have in common."""
    heads = f"{shape['heads']}/{shape['kv_heads']} heads of {shape['head_dim']}"
    title = [f"B{shape['batch']}", heads]
    title += ["FP8 KV"] if shape.get("fp8") else []
    return title + ([f"window {shape['window']}"] if shape.get("window") else [])


def heat(path: Path, maps: Sequence[Panel], base: str) -> Path:
    """Draw `grids`' panels on one colour scale: brown is slower than the base, green is faster."""
    columns = min(COLUMNS, len(maps))
    lines = ceil(len(maps) / columns)
    tallest = max(len(panel.suffixes) for panel in maps)
    figure, axes = panels(lines, columns, 0.6 + lines * (0.9 + 0.36 * tallest))
    logs = [log2(value) for panel in maps for value in panel.cells.values()]
    low, high = min(0.0, *logs), max(0.0, *logs)
    limit = max(1.0, -low, high)
    for panel, panel_axes in zip(maps, axes.flat, strict=False):
        image = _draw(panel_axes, panel, limit)
    for panel_axes in axes.flat[len(maps) :]:
        panel_axes.set_visible(False)
    ticks = range(ceil(low), floor(high) + 1, ceil((high - low) / 8) or 1)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, aspect=30, pad=0.02, ticks=list(ticks))
    bar.ax.set_ylim(low, high or 1)
    bar.ax.set_yticks(list(ticks), [f"{format_number(2.0**tick)} ×" for tick in ticks])
    bar.outline.set_visible(False)
    figure.suptitle(f"prefix_attention: speed-up over {BASES[base]}", x=0.01, ha="left")
    return save(figure, path)


def _draw(axes: Any, panel: Panel, limit: float) -> Any:  # noqa: ANN401
    import numpy as np

    values = np.full((len(panel.suffixes), len(panel.prefixes)), np.nan)
    for (prefix, suffix), value in panel.cells.items():
        values[panel.suffixes.index(suffix), panel.prefixes.index(prefix)] = log2(value)
    axes.set_facecolor("#eeeeee")  # not measured
    image = axes.imshow(values, cmap="BrBG", vmin=-limit, vmax=limit, aspect="auto")
    for (prefix, suffix), value in panel.cells.items():
        axes.annotate(
            format_number(value),
            (panel.prefixes.index(prefix), panel.suffixes.index(suffix)),
            ha="center",
            va="center",
            fontsize=8.5,
            color="white" if _dark(image.to_rgba(log2(value))) else INK,
        )
    axes.set_xticks(range(len(panel.prefixes)), [f"{p:,}" for p in panel.prefixes], fontsize=8)
    axes.set_yticks(range(len(panel.suffixes)), [f"{s:,}" for s in panel.suffixes], fontsize=8)
    axes.set(title=panel.title, xlabel="prefix, tokens", ylabel="suffix, tokens")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def _dark(rgba: Sequence[float]) -> bool:
    """Whether white text is easier to read on a colour than dark grey (relative luminance)."""
    red, green, blue, _ = (channel**2.2 for channel in rgba)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.24
