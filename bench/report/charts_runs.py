"""Pictures of whole steps and runs: what a decode step is made of, occupancy, history."""

from collections.abc import Iterable, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from bench.report.charts import (
    BLUE,
    BROWN,
    EAGER,
    GREEN,
    INK,
    ORANGE,
    OURS,
    PINK,
    SKY,
    duration,
    panels,
    save,
)
from bench.report.rows import best, grouped, when
from pacore_sched.sim.plots import area_and_line

PARTS = ((BLUE, ""), (ORANGE, "//"), (GREEN, "\\\\"), (SKY, "xx"), (PINK, ".."), ("#F0E442", "--"))
PARTS += (("#999999", "++"), (BROWN, ""))  # from the ninth on again from the first
COLUMNS, PANELS = 3, 15  # small multiples: beside each other, in a picture
MOST = 12  # cases of an op whose history is drawn


def of_one_run(parts: Sequence[dict]) -> list[dict]:
    """Of each step the parts of its latest commit: others of its parts add up to another step."""
    newest = {step: max(of_step, key=when) for step, of_step in _steps(parts).items()}
    return [
        row
        for step, of_step in _steps(parts).items()
        for row in of_step
        if row["commit"] == newest[step]["commit"]
    ]


def _steps(parts: Sequence[dict]) -> dict[tuple, list[dict]]:
    return grouped(parts, "case", "dtype", "impl")


def decode_parts(path: Path, parts: Sequence[dict], steps: Sequence[dict]) -> Path:
    """Stacked bars: what a decode step is made of, with its floor where the step was measured."""
    cases = grouped(parts, "case", "dtype")
    forms = [grouped(of_case, "impl") for of_case in cases.values()]
    names = list(dict.fromkeys(row["part"] for row in parts))
    styles = {name: PARTS[number % len(PARTS)] for number, name in enumerate(names)}
    heights = [0.75 + 0.34 * len(of_case) for of_case in forms]
    figure, axes = panels(len(cases), 1, 0.7 + sum(heights), height_ratios=heights)
    for panel, (case, dtype), of_case in zip(axes[:, 0], cases, forms, strict=True):
        labels = [impl for (impl,) in of_case]
        for y, (impl, of_form) in enumerate(zip(labels, of_case.values(), strict=True)):
            _stack(panel, y, of_form, styles)
            for step in steps:
                if (step["case"], step["impl"], step["dtype"]) == (case, impl, dtype):
                    _floor(panel, y, step)
        panel.set_yticks(range(len(labels)), labels)
        panel.set(title=f"{case}, {dtype}", ylim=(len(labels) - 0.4, -0.6))
        panel.set_xlim(0)
        panel.xaxis.set_major_formatter(duration)
        panel.tick_params(axis="y", length=0)
        panel.grid(axis="x")
    handles = {
        label: handle
        for panel in axes[:, 0]
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside upper left", ncols=4)
    return save(figure, path)


def _stack(axes: Any, y: int, parts: Sequence[dict], styles: dict) -> None:  # noqa: ANN401
    left = 0.0
    for row in parts:
        colour, hatch = styles[row["part"]]
        axes.barh(
            y,
            row["median_us"],
            left=left,
            height=0.62,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=row["part"],
        )
        left += row["median_us"]


def _floor(axes: Any, y: int, step: dict) -> None:  # noqa: ANN401
    """Marks of the whole step's floor and of its own median, which holds no profiler."""
    floor = step["median_us"] * step["roofline_pct"] / 100
    axes.plot(
        *([floor, floor], [y - 0.42, y + 0.42]),
        color=INK,
        linewidth=2.6,
        solid_capstyle="butt",
        label="roofline floor of the step",
    )
    axes.plot(
        *(step["median_us"], y),
        linestyle="",
        marker="D",
        color="white",
        markeredgecolor=INK,
        label="the step, measured whole",
    )


def has_timeline(row: dict) -> bool:
    """Whether a row has a timeline that can be drawn: lists of numbers, all of one length."""
    timeline = row.get("timeline")
    if not isinstance(timeline, dict):
        return False
    lists = [timeline.get(name) for name in ("seconds", "running", "kv_tokens")]
    return (
        all(isinstance(values, list) and len(values) > 1 for values in lists)
        and len(set(map(len, lists))) == 1
        and all(isinstance(x, int | float) for values in lists for x in values)
    )


def timelines(path: Path, rows: Sequence[dict]) -> Path:
    """Rollouts that run and tokens of KV in use over time, a panel per form, on the same axes."""
    figure, axes = panels(len(rows), 1, 0.7 + 1.6 * len(rows), sharex=True, sharey=True)
    most = max(max(row["timeline"]["running"]) for row in rows)
    for panel, row in zip(axes[:, 0], rows, strict=True):
        line = row["timeline"]
        title = f"{row['case']}, {row['impl']}"
        right = area_and_line(panel, title, line["seconds"], line["kv_tokens"], line["running"])
        right.set_ylim(0, 1.1 * most)
        panel.set_ylabel("tokens of KV")
        panel.yaxis.set_major_formatter("{x:,.0f}")
        panel.grid()
    axes[0, 0].set_xlim(0)
    axes[0, 0].set_ylim(0)
    axes[-1, 0].set_xlabel("seconds")
    return save(figure, path)


def history(rows: Iterable[dict]) -> list[list[dict]]:
    """The best row of ours at every commit, oldest first: a list per case of two commits or more.

    Of rows of one form at one commit the latest counts. Of an op with many cases those are left
    that changed most.
    """
    timed = sorted((row for row in rows if row["median_us"] and row["case"]), key=when)
    found: dict[str, list[list[dict]]] = {}
    for (op, *_), of_case in grouped(timed, "op", "case", "policy", "dtype").items():
        points = []
        for of_commit in grouped(of_case, "commit").values():
            latest = {row["impl"]: row for row in of_commit}
            points.append(best(latest.values(), "ours"))
        points = [point for point in points if point]
        if len(points) > 1:
            found.setdefault(op, []).append(points)
    return [case for of_op in found.values() for case in sorted(of_op, key=_change)[-MOST:]]


def _change(points: Sequence[dict]) -> float:
    times = [point["median_us"] for point in points]
    return max(times) / min(times)


def small_multiples(stem: Path, cases: Sequence[list[dict]]) -> list[Path]:
    """Times of ours over commits, a panel per case of `history`; pictures of PANELS panels."""
    made = []
    for number, start in enumerate(range(0, len(cases), PANELS), start=1):
        shown = cases[start : start + PANELS]
        lines = ceil(len(shown) / COLUMNS)
        figure, axes = panels(lines, COLUMNS, 0.2 + 1.75 * lines)
        for panel, points in zip(axes.flat, shown, strict=False):
            _over_commits(panel, points)
        for panel in axes.flat[len(shown) :]:
            panel.set_visible(False)
        page = f"-{number}" if len(cases) > PANELS else ""
        made.append(save(figure, stem.with_name(f"{stem.name}{page}.png")))
    return made


def _over_commits(axes: Any, points: Sequence[dict]) -> None:  # noqa: ANN401
    x = range(len(points))
    middle = [point["median_us"] for point in points]
    axes.vlines(
        x, [p["p20_us"] for p in points], [p["p80_us"] for p in points], color=EAGER, linewidth=1.2
    )
    axes.plot(x, middle, color=OURS, marker="D", markersize=4, linewidth=1.2)
    axes.set_ylim(0, 1.15 * max(point["p80_us"] for point in points))
    axes.locator_params(axis="y", nbins=4)
    axes.yaxis.set_major_formatter(duration)
    commits = [str(point["commit"])[:7] for point in points]
    axes.set_xticks(x, commits, rotation=40, ha="right", rotation_mode="anchor", fontsize=7)
    axes.set_xlim(-0.5, len(points) - 0.5)
    axes.tick_params(axis="y", labelsize=7)
    name = ", ".join(filter(None, (points[0][field] for field in ("case", "policy", "dtype"))))
    name = name if len(name) < 38 else name[:36] + "…"
    axes.set_title(f"{points[0]['op']}\n{name}", fontsize=8)
    axes.grid(axis="y")
