"""Pictures of op rows: times and rates of our forms, eager and peers, and the roofline."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from bench.report.charts import (
    EAGER,
    INK,
    MAX_HEIGHT,
    OURS,
    drawing_order,
    format_number,
    legend,
    marker_style,
    panels,
    save,
    times_axis,
)
from bench.report.rows import best, group_by, role

MAX_CASES = 24  # drawn per op: the first in a file, which are the most important
HEAD, CASE, FORM = 1.1, 0.20, 0.115  # heights in inches: of a picture, plus each case and form
LINE = 0.16  # height in inches of a line of a case's name


def latency(stem: Path, rows: Sequence[dict]) -> list[Path]:
    """Draw time and rate of every form in up to MAX_CASES cases of one op, on one or more pages."""
    cases = list(group_by(rows, "case", "dtype").values())[:MAX_CASES]
    pages: list[list[list[dict]]] = [[]]
    for case in cases:
        if HEAD + sum(map(_height, [*pages[-1], case])) > MAX_HEIGHT:
            pages.append([])
        pages[-1].append(case)
    paths = []
    for number, page in enumerate(filter(None, pages), start=1):
        path = stem.with_name(stem.name + (f"-{number}" if len(pages) > 1 else "") + ".png")
        paths.append(_latency(path, page))
    return paths


def _height(case: Sequence[dict]) -> float:
    return max(CASE + FORM * len(case), 0.06 + LINE * len(_name_lines(case[0]["case"])))


def _name_lines(name: str) -> list[str]:
    """A case's name in lines short enough to leave the axes room."""
    return wrap(name, 30) or [""]


def _latency(path: Path, cases: Sequence[Sequence[dict]]) -> Path:
    rows = [row for case in cases for row in case]
    figure, ((left, right),) = panels(
        1, 2, HEAD + sum(map(_height, cases)), sharey=True, width_ratios=(3, 2)
    )
    rate, unit, ceiling = _rate(rows)
    show_dtype = len({row["dtype"] for row in rows}) > 1
    top, ticks = 0.0, []
    for number, case in enumerate(cases):
        _draw_case(left, right, drawing_order(case), top, rate)
        label = "\n".join(_name_lines(case[0]["case"]))
        label += f"\n{case[0]['dtype']}" if show_dtype else ""
        ticks.append((top + _height(case) / 2, label))
        for axes in (left, right) if number % 2 == 0 else ():
            axes.axhspan(top, top + _height(case), color="#f3f3f3", linewidth=0, zorder=0)
        _draw_speedups(right, case, top + _height(case) / 2)
        top += _height(case)
    left.set_yticks(*zip(*ticks, strict=True))
    left.set_ylim(top, 0)
    times_axis(left.xaxis, min(r["p20_us"] for r in rows), max(r["p80_us"] for r in rows))
    highest = max(*(rate(row) for row in rows), ceiling or 0)
    right.set(xlim=(-0.03 * highest, 1.06 * highest), xlabel=unit)
    if ceiling:
        right.axvline(ceiling, color=INK, linewidth=1, linestyle="--")
    left.set_xlabel("median time; bars show p20 to p80")
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
    legend(figure, rows)
    return save(figure, path)


def _draw_case(left: Any, right: Any, case: list[dict], top: float, rate: Any) -> None:  # noqa: ANN401
    for number, row in enumerate(case):
        y = top + CASE / 2 + FORM * (number + 0.5)
        style = marker_style(row) | {"zorder": 4 if role(row) == "ours" else 3}
        left.plot((row["p20_us"], row["p80_us"]), (y, y), color=style["color"], linewidth=1.4)
        left.plot(row["median_us"], y, linestyle="", **style)
        right.plot(rate(row), y, linestyle="", **style)


def _draw_speedups(right: Any, case: Sequence[dict], y: float) -> None:  # noqa: ANN401
    """Write our best form's speed-ups over eager and the best peer at the right margin."""
    ours = best(case, "ours")
    others = {"eager": best(case, "eager"), "peer": best(case, "peer")}
    if ours:
        text = "\n".join(
            f"{other['median_us'] / ours['median_us']:.2f} × {name}"
            for name, other in others.items()
            if other
        )
        right.annotate(
            text,
            (1.02, y),
            xycoords=("axes fraction", "data"),
            color=OURS,
            fontsize=8,
            va="center",
            annotation_clip=False,
        )


def _rate(rows: Sequence[dict]) -> tuple[Any, str, float | None]:
    """A row's rate in GB/s or TFLOP/s, whichever bounds most cases; axis label; ceiling."""
    floors = [
        (row["bytes"] / (1e3 * row["copy_gb_s"]), row["flops"] / (1e6 * row["gemm_tflop_s"]))
        for row in rows
        if row["copy_gb_s"] and row["gemm_tflop_s"]
    ]
    memory = sum(by_bytes >= by_flops for by_bytes, by_flops in floors) * 2 >= len(floors)
    field, per_us, name, top = (
        ("bytes", 1e3, "GB/s", "copy_gb_s") if memory else ("flops", 1e6, "TFLOP/s", "gemm_tflop_s")
    )
    ceiling = max((row[top] for row in rows if row[top]), default=None)
    bound = "copy bandwidth" if memory else "matrix rate"
    unit = name + (f" (dashed: {bound}, {format_number(ceiling)})" if ceiling else "")
    return lambda row: row[field] / row["median_us"] / per_us, unit, ceiling


def roofline(path: Path, rows: Sequence[dict]) -> Path:
    """Draw FLOP/s over arithmetic intensity, with the measured roof, a panel per dtype."""
    dtypes = group_by([row for row in rows if row["copy_gb_s"] and row["gemm_tflop_s"]], "dtype")
    figure, axes = panels(len(dtypes), 1, 0.5 + 4.2 * len(dtypes))
    for panel, ((dtype,), dtype_rows) in zip(axes[:, 0], dtypes.items(), strict=True):
        _roofline(figure, panel, dtype, dtype_rows)
    return save(figure, path)


def _roofline(figure: Any, axes: Any, dtype: str, rows: list[dict]) -> None:  # noqa: ANN401
    roof = rows[-1]
    copy, gemm = roof["copy_gb_s"] * 1e9, roof["gemm_tflop_s"] * 1e12
    pairs = [
        (best(case, "eager"), best(case, "ours")) for case in group_by(rows, "op", "case").values()
    ]
    x = np.array([_intensity(row) for row in rows])
    span = np.geomspace(min(x.min(), gemm / copy) / 2, max(x.max(), gemm / copy) * 2, 100)
    roof_line = np.minimum(copy * span, gemm) / 1e12
    axes.plot(span, roof_line, color=INK, linewidth=1.3)
    for eager, ours in pairs:
        if eager and ours:
            ends = ([_intensity(row) for row in (eager, ours)], [_tflop_s(eager), _tflop_s(ours)])
            axes.plot(*ends, color=OURS, alpha=0.35, linewidth=1)
        for row in filter(None, (eager, ours)):
            fill = OURS if row is ours else "white"
            edge, marker = (OURS, "D") if row is ours else (EAGER, "o")
            axes.plot(
                *([_intensity(row)], [_tflop_s(row)]),
                **{"marker": marker, "color": edge, "markerfacecolor": fill, "markersize": 5.5},
                zorder=4 if row is ours else 3,
            )
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="TFLOP/s")
    axes.set_ylim(top=3 * max(gemm / 1e12, *map(_tflop_s, rows)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(format_number)
    axes.set_title(
        f"{dtype}: {format_number(roof['copy_gb_s'])} GB/s,"
        f" {format_number(roof['gemm_tflop_s'])} TFLOP/s"
        " (filled: our best form, hollow: eager)"
    )
    axes.grid()
    named = [either for eager, ours in pairs if (either := ours or eager)]
    marks = [(_intensity(row), _tflop_s(row)) for pair in pairs for row in filter(None, pair)]
    _label(figure, axes, named, [*marks, *zip(span, roof_line, strict=True)])


def _label(figure: Any, axes: Any, rows: list[dict], marks: list[tuple[float, float]]) -> None:  # noqa: ANN401
    """Label each op once, at its case with the most FLOPs, next to the marker if there is room."""
    figure.canvas.draw()
    pixels = axes.transData.transform
    taken = [_box(pixels(point)) for point in marks]
    names: list[Any] = []
    for op_rows in group_by(rows, "op").values():
        row = max(op_rows, key=lambda row: row["flops"])
        at = (_intensity(row), _tflop_s(row))
        for offset, side in _label_offsets():
            text = _annotate(axes, row["op"], at, offset, side)
            text.update_positions(figure.canvas.get_renderer())
            box = _extent(text)
            leader = [_box(point, 2) for point in np.linspace(pixels(at), _middle(box), 12)[2:-4]]
            inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
            crossed = any(box.overlaps(other) for other in taken)
            if inside and not crossed and not any(a.overlaps(b) for a in leader for b in names):
                taken += [box, *leader]
                names.append(box)
                break
            text.remove()


def _label_offsets() -> Iterator[tuple[tuple[float, float], str]]:
    """Offsets of a label in points, the nearest first, and its horizontal alignment."""
    for dy in (0, 10, -10, 22, -22, 36, -36, 52, -52, 70, -70, 90, -90, 110, -110):
        yield (8, dy), "left"
        yield (-8, dy), "right"


def _annotate(axes: Any, name: str, at: tuple, offset: tuple, side: str) -> Any:  # noqa: ANN401
    leader = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.6}
    return axes.annotate(
        *(name, at, offset),
        textcoords="offset points",
        ha=side,
        va="center",
        fontsize=8,
        color=INK,
        arrowprops=leader if abs(offset[1]) > 12 else None,
    )


def _extent(annotation: Any) -> Any:  # noqa: ANN401
    """The extent of the text without its leader line."""
    from matplotlib.text import Text

    return Text.get_window_extent(annotation)


def _middle(box: Any) -> tuple[float, float]:  # noqa: ANN401
    return (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2


def _box(middle: Sequence[float], size: float = 6) -> Any:  # noqa: ANN401
    from matplotlib.transforms import Bbox

    return Bbox.from_bounds(middle[0] - size, middle[1] - size, 2 * size, 2 * size)


def _intensity(row: dict) -> float:
    return row["flops"] / row["bytes"]


def _tflop_s(row: dict) -> float:
    return row["flops"] / row["median_us"] / 1e6
