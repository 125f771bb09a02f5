"""Pictures of the op table: times and rates beside eager and peers, and the roofline."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from bench.report.charts import (
    EAGER,
    INK,
    OURS,
    TALLEST,
    in_order,
    legend,
    mark,
    panels,
    plain,
    save,
    times_axis,
)
from bench.report.rows import best, grouped, role

MOST = 24  # cases of an op that are drawn: those first in a file tell most
HEAD, CASE, FORM = 1.1, 0.20, 0.115  # inches: of a picture, of a case in it, of each of its forms
LINE = 0.16  # of a case's name


def latency(stem: Path, rows: Sequence[dict]) -> list[Path]:
    """Time and rate of every form at MOST cases of one op; several pictures if they are many."""
    cases = list(grouped(rows, "case", "dtype").values())[:MOST]
    pages: list[list[list[dict]]] = [[]]
    for case in cases:
        if HEAD + sum(map(_height, [*pages[-1], case])) > TALLEST:
            pages.append([])
        pages[-1].append(case)
    made = []
    for number, page in enumerate(filter(None, pages), start=1):
        path = stem.with_name(stem.name + (f"-{number}" if len(pages) > 1 else "") + ".png")
        made.append(_latency(path, page))
    return made


def _height(case: Sequence[dict]) -> float:
    return max(CASE + FORM * len(case), 0.06 + LINE * len(_label_of(case[0]["case"])))


def _label_of(name: str) -> list[str]:
    """The lines of a case's name; long ones would leave the axes no room."""
    return wrap(name, 30) or [""]


def _latency(path: Path, cases: Sequence[Sequence[dict]]) -> Path:
    rows = [row for case in cases for row in case]
    figure, ((left, right),) = panels(
        1, 2, HEAD + sum(map(_height, cases)), sharey=True, width_ratios=(3, 2)
    )
    rate, unit, ceiling = _rate(rows)
    several = len({row["dtype"] for row in rows}) > 1
    top, ticks = 0.0, []
    for number, case in enumerate(cases):
        _draw_case(left, right, in_order(case), top, rate)
        label = "\n".join(_label_of(case[0]["case"]))
        label += f"\n{case[0]['dtype']}" if several else ""
        ticks.append((top + _height(case) / 2, label))
        for axes in (left, right) if number % 2 == 0 else ():
            axes.axhspan(top, top + _height(case), color="#f3f3f3", linewidth=0, zorder=0)
        _draw_gains(right, case, top + _height(case) / 2)
        top += _height(case)
    left.set_yticks(*zip(*ticks, strict=True))
    left.set_ylim(top, 0)
    times_axis(left.xaxis, min(r["p20_us"] for r in rows), max(r["p80_us"] for r in rows))
    most = max(*(rate(row) for row in rows), ceiling or 0)
    right.set(xlim=(-0.03 * most, 1.06 * most), xlabel=unit)
    if ceiling:
        right.axvline(ceiling, color=INK, linewidth=1, linestyle="--")
    left.set_xlabel("time, median with p20..p80")
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
    legend(figure, rows)
    return save(figure, path)


def _draw_case(left: Any, right: Any, case: list[dict], top: float, rate: Any) -> None:  # noqa: ANN401
    for number, row in enumerate(case):
        y = top + CASE / 2 + FORM * (number + 0.5)
        style = mark(row) | {"zorder": 4 if role(row) == "ours" else 3}
        left.plot((row["p20_us"], row["p80_us"]), (y, y), color=style["color"], linewidth=1.4)
        left.plot(row["median_us"], y, linestyle="", **style)
        right.plot(rate(row), y, linestyle="", **style)


def _draw_gains(right: Any, case: Sequence[dict], y: float) -> None:  # noqa: ANN401
    """How many times faster than eager, and than the best peer, the best of ours is."""
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
    """What bounds most of these cases: bytes or FLOPs; a row's rate of it, and its ceiling."""
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
    what = "copy bandwidth" if memory else "matrix product"
    unit = name + (f" (dashed: {what}, {plain(ceiling)})" if ceiling else "")
    return lambda row: row[field] / row["median_us"] / per_us, unit, ceiling


def roofline(path: Path, rows: Sequence[dict]) -> Path:
    """Arithmetic intensity against the rate reached, a panel per dtype, below the measured roof."""
    dtypes = grouped([row for row in rows if row["copy_gb_s"] and row["gemm_tflop_s"]], "dtype")
    figure, axes = panels(len(dtypes), 1, 0.5 + 4.2 * len(dtypes))
    for panel, ((dtype,), of_dtype) in zip(axes[:, 0], dtypes.items(), strict=True):
        _roofline(figure, panel, dtype, of_dtype)
    return save(figure, path)


def _roofline(figure: Any, axes: Any, dtype: str, rows: list[dict]) -> None:  # noqa: ANN401
    roof = rows[-1]
    copy, gemm = roof["copy_gb_s"] * 1e9, roof["gemm_tflop_s"] * 1e12
    pairs = [
        (best(case, "eager"), best(case, "ours")) for case in grouped(rows, "op", "case").values()
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
        axis.set_major_formatter(plain)
    axes.set_title(
        f"{dtype}: {plain(roof['copy_gb_s'])} GB/s, {plain(roof['gemm_tflop_s'])} TFLOP/s"
        " (filled: best of ours, hollow: eager)"
    )
    axes.grid()
    named = [ours or eager for eager, ours in pairs if eager or ours]
    marks = [(_intensity(row), _tflop_s(row)) for pair in pairs for row in filter(None, pair)]
    _label(figure, axes, named, [*marks, *zip(span, roof_line, strict=True)])


def _label(figure: Any, axes: Any, rows: list[dict], marks: list[tuple[float, float]]) -> None:  # noqa: ANN401
    """Name each op once, where it has most to do; beside its mark, where there is room."""
    figure.canvas.draw()
    pixels = axes.transData.transform
    taken = [_box(pixels(mark)) for mark in marks]
    names: list[Any] = []
    for of_op in grouped(rows, "op").values():
        row = max(of_op, key=lambda row: row["flops"])
        at = (_intensity(row), _tflop_s(row))
        for offset, side in _places():
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


def _places() -> Iterator[tuple[tuple[float, float], str]]:
    """Offsets in points, the nearest first, and the side of the text that is there."""
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
    """Where the text is drawn, without its leader."""
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
