"""Pictures of decode steps by part, of occupancy over a run, and of history over commits."""

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
    format_duration,
    panels,
    save,
)
from bench.report.rows import best, group_by, time_of
from pacore_sched.sim.plots import area_and_line

PARTS = (  # the ninth part starts again with the first style
    (BLUE, ""),
    (ORANGE, "//"),
    (GREEN, "\\\\"),
    (SKY, "xx"),
    (PINK, ".."),
    ("#F0E442", "--"),
    ("#999999", "++"),
    (BROWN, ""),
)
COLUMNS, PANELS = 3, 15  # small multiples: per row, per picture
MAX_CASES = 12  # cases of an op whose history is drawn


def parts_of_latest_commit(parts: Sequence[dict]) -> list[dict]:
    """The parts of each step from its latest commit: parts of two commits do not add up."""
    newest = {step: max(step_parts, key=time_of) for step, step_parts in _by_step(parts).items()}
    return [
        row
        for step, step_parts in _by_step(parts).items()
        for row in step_parts
        if row["commit"] == newest[step]["commit"]
    ]


def _by_step(parts: Sequence[dict]) -> dict[tuple, list[dict]]:
    return group_by(parts, "case", "dtype", "impl")


def decode_parts(path: Path, parts: Sequence[dict], steps: Sequence[dict]) -> Path:
    """Draw decode steps as bars of stacked parts, with the floor of steps that were measured."""
    cases = group_by(parts, "case", "dtype")
    forms = [group_by(case_parts, "impl") for case_parts in cases.values()]
    names = list(dict.fromkeys(row["part"] for row in parts))
    styles = {name: PARTS[number % len(PARTS)] for number, name in enumerate(names)}
    heights = [0.75 + 0.34 * len(case_forms) for case_forms in forms]
    figure, axes = panels(len(cases), 1, 0.7 + sum(heights), height_ratios=heights)
    for panel, (case, dtype), case_forms in zip(axes[:, 0], cases, forms, strict=True):
        labels = [impl for (impl,) in case_forms]
        for y, (impl, form_parts) in enumerate(zip(labels, case_forms.values(), strict=True)):
            _stack(panel, y, form_parts, styles)
            for step in steps:
                if (step["case"], step["impl"], step["dtype"]) == (case, impl, dtype):
                    _floor(panel, y, step)
        panel.set_yticks(range(len(labels)), labels)
        panel.set(title=f"{case}, {dtype}", ylim=(len(labels) - 0.4, -0.6))
        panel.set_xlim(0)
        panel.xaxis.set_major_formatter(format_duration)
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
    """Mark the whole step's floor, and its median, measured without a profiler."""
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
        label="whole step, without profiler",
    )


def has_timeline(row: dict) -> bool:
    """Whether a row has a timeline that can be drawn: lists of numbers of equal length."""
    timeline = row.get("timeline")
    if not isinstance(timeline, dict):
        return False
    lists: list[Any] = [timeline.get(name) for name in ("seconds", "running", "kv_tokens")]
    return (
        all(isinstance(values, list) and len(values) > 1 for values in lists)
        and len(set(map(len, lists))) == 1
        and all(isinstance(x, int | float) for values in lists for x in values)
    )


def timelines(path: Path, rows: Sequence[dict]) -> Path:
    """Draw running rollouts and KV tokens in use over time, a panel per form, with equal axes."""
    figure, axes = panels(len(rows), 1, 0.7 + 1.6 * len(rows), sharex=True, sharey=True)
    max_running = max(max(row["timeline"]["running"]) for row in rows)
    for panel, row in zip(axes[:, 0], rows, strict=True):
        line = row["timeline"]
        title = f"{row['case']}, {row['impl']}"
        right = area_and_line(panel, title, line["seconds"], line["kv_tokens"], line["running"])
        right.set_ylim(0, 1.1 * max_running)
        panel.set_ylabel("KV tokens")
        panel.yaxis.set_major_formatter("{x:,.0f}")
        panel.grid()
    axes[0, 0].set_xlim(0)
    axes[0, 0].set_ylim(0)
    axes[-1, 0].set_xlabel("seconds")
    return save(figure, path)


def history(rows: Iterable[dict]) -> list[list[dict]]:
    """The row of our best form at every commit, oldest first: a list per case with two commits or
    more.

    If a form has several rows at one commit, the latest counts. At most MAX_CASES cases of an op
    are returned, those that changed most.
    """
    timed = sorted((row for row in rows if row["median_us"] and row["case"]), key=time_of)
    by_op: dict[str, list[list[dict]]] = {}
    for (op, *_), case_rows in group_by(timed, "op", "case", "policy", "dtype").items():
        points = []
        for commit_rows in group_by(case_rows, "commit").values():
            latest = {row["impl"]: row for row in commit_rows}
            if ours := best(latest.values(), "ours"):
                points.append(ours)
        if len(points) > 1:
            by_op.setdefault(op, []).append(points)
    return [case for cases in by_op.values() for case in sorted(cases, key=_change)[-MAX_CASES:]]


def _change(points: Sequence[dict]) -> float:
    times = [point["median_us"] for point in points]
    return max(times) / min(times)


def small_multiples(stem: Path, cases: Sequence[list[dict]]) -> list[Path]:
    """Draw our times over commits, a panel per case of `history`, PANELS panels per picture."""
    paths = []
    for number, start in enumerate(range(0, len(cases), PANELS), start=1):
        shown = cases[start : start + PANELS]
        lines = ceil(len(shown) / COLUMNS)
        figure, axes = panels(lines, COLUMNS, 0.2 + 1.75 * lines)
        for panel, points in zip(axes.flat, shown, strict=False):
            _over_commits(panel, points)
        for panel in axes.flat[len(shown) :]:
            panel.set_visible(False)
        page = f"-{number}" if len(cases) > PANELS else ""
        paths.append(save(figure, stem.with_name(f"{stem.name}{page}.png")))
    return paths


def _over_commits(axes: Any, points: Sequence[dict]) -> None:  # noqa: ANN401
    x = range(len(points))
    middle = [point["median_us"] for point in points]
    axes.vlines(
        x, [p["p20_us"] for p in points], [p["p80_us"] for p in points], color=EAGER, linewidth=1.2
    )
    axes.plot(x, middle, color=OURS, marker="D", markersize=4, linewidth=1.2)
    axes.set_ylim(0, 1.15 * max(point["p80_us"] for point in points))
    axes.locator_params(axis="y", nbins=4)
    axes.yaxis.set_major_formatter(format_duration)
    commits = [str(point["commit"])[:7] for point in points]
    axes.set_xticks(x, commits, rotation=40, ha="right", rotation_mode="anchor", fontsize=7)
    axes.set_xlim(-0.5, len(points) - 0.5)
    axes.tick_params(axis="y", labelsize=7)
    name = ", ".join(filter(None, (points[0][field] for field in ("case", "policy", "dtype"))))
    name = name if len(name) < 38 else name[:36] + "…"
    axes.set_title(f"{points[0]['op']}\n{name}", fontsize=8)
    axes.grid(axis="y")
