"""docs/decode.svg, the plot at the top of README: decode attention of 16 rollouts.

It shows the rows of the `decode` table, or a GPU's rows for the same cases once there are any. The
file's description has the plotted numbers as JSON, so that a stale plot is noticed with any version
of matplotlib, or without it. To redraw a plot whose numbers are current (after a change of style),
delete it first.
"""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.report.charts import INK, marker_style
from pacore_sched.sim.plots import pyplot
from profiles.tables.figures import Row
from profiles.tables.gpu import gpu_folders
from profiles.tables.results import DECODE_CASES, RESULTS, DecodeCase, cpu_decode_rows

DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
GPU_FORMS = ("eager", "sdpa", "triton")
DESCRIPTION = "{http://purl.org/dc/elements/1.1/}description"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 13,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "decode",
}


def is_current(file: Path, results: Path = RESULTS) -> bool:
    """Whether the plot exists and shows the numbers of the committed rows."""
    return _embedded(file) == plotted(results)


def plotted(results: Path = RESULTS) -> dict:
    """Everything that the plot shows, as JSON values; times in ms, floors from the same run."""
    rows = _gpu_rows(results) or cpu_decode_rows()
    first = rows[0][1][0]
    return {
        "title": "Decode attention, 16 rollouts",
        "machine": f"{first['device']}, {DTYPES[first['dtype']]}",
        "cases": [
            {
                "label": case.plot_label,
                "floor_ms": _ms(forms[-1]["median_us"] * forms[-1]["roofline_pct"] / 100),
                "forms": [
                    {"impl": row["impl"]}
                    | {name: _ms(row[f"{name}_us"]) for name in ("p20", "median", "p80")}
                    for row in forms
                ],
            }
            for case, forms in rows
        ],
    }


def draw(file: Path, results: Path = RESULTS) -> None:
    """Write the plot. The same rows give the same bytes with one version of matplotlib.

    Raises InputError if matplotlib is not installed.
    """
    plt, shown = pyplot(), plotted(results)
    with plt.rc_context():
        plt.rcdefaults()
        plt.rcParams.update(STYLE)
        figure = _figure(plt, shown)
        metadata = {"Date": None, "Creator": None, "Title": shown["title"]}
        figure.savefig(file, format="svg", metadata=metadata | {"Description": json.dumps(shown)})
        plt.close(figure)


def _gpu_rows(results: Path) -> list[tuple[DecodeCase, list[Row]]]:
    """The rows of the GPU that was measured last, for the cases of which it has all forms."""
    folders = [rows for _, rows in gpu_folders(results)]
    for rows in sorted(folders, key=lambda rows: rows[-1].get("time") or "", reverse=True):
        complete = []
        for case in DECODE_CASES:
            of_impl = {
                row["impl"]: row
                for row in rows
                if (row["op"], row["case"]) == ("prefix_attention", case.case)
                and row["dtype"] == "bfloat16"
            }
            if all(impl in of_impl for impl in GPU_FORMS):
                complete.append((case, [of_impl[impl] for impl in GPU_FORMS]))
        if complete:
            return complete
    return []


def _embedded(file: Path) -> dict | None:
    """The numbers in the file's description; None without a file or a description."""
    try:
        description = ElementTree.parse(file).find(f".//{DESCRIPTION}")
        return json.loads(description.text or "") if description is not None else None
    except (OSError, ElementTree.ParseError, json.JSONDecodeError):
        return None


def _figure(plt: Any, shown: dict) -> Any:  # noqa: ANN401
    """A line per form under each case's heading, the floor as a dashed mark across the case."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    per_case = len(shown["cases"][0]["forms"]) + 1.5  # lines, with the heading and a gap
    figure, axes = plt.subplots(figsize=(9, 0.36 * per_case * len(shown["cases"]) + 1.1))
    ticks, names = [], []
    for index, case in enumerate(shown["cases"]):
        top = index * per_case
        heading = {"transform": axes.get_yaxis_transform(), "va": "center", "weight": "bold"}
        axes.text(0.0, top, case["label"], **heading)
        lines = [top + 1 + i for i in range(len(case["forms"]))]
        axes.vlines(case["floor_ms"], lines[0] - 0.5, lines[-1] + 0.5, INK, (0, (3, 2)), lw=1.6)
        label = f" floor {_figures(case['floor_ms'])}"
        axes.text(case["floor_ms"], lines[0], label, va="center", size=12)
        for y, form in zip(lines, case["forms"], strict=True):
            _draw_form(axes, y, form)
            ticks.append(y)
            names.append(_name(form))
    axes.set_yticks(ticks, names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(shown["cases"]) * per_case - 0.9, -0.8)
    axes.set_xscale("log")
    axes.set_xlim(*_limits(shown))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("ms (log scale): median, whiskers p20 to p80; dashed: roofline floor")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(f"{shown['title']}: {shown['machine']}", x=0.02, ha="left", size=15)
    figure.tight_layout(pad=0.6)
    return figure


def _draw_form(axes: Any, y: float, form: dict) -> None:  # noqa: ANN401
    """A marker at the median, whiskers from p20 to p80, and the median in figures."""
    style = marker_style(form)
    whiskers = [[form["median"] - form["p20"]], [form["p80"] - form["median"]]]
    axes.errorbar(form["median"], y, xerr=whiskers, ecolor=style["color"], capsize=4, **style)
    ours = _name(form) == "ours"
    text = f"  {_figures(form['median'])} ms"
    axes.text(form["p80"], y, text, va="center", weight="bold" if ours else "normal")


def _limits(shown: dict) -> tuple[float, float]:
    floors = [case["floor_ms"] for case in shown["cases"]]
    slowest = [form["p80"] for case in shown["cases"] for form in case["forms"]]
    return min(floors) / 2.5, max(slowest) * 2.5


def _name(form: dict) -> str:
    return {"eager": "eager", "sdpa": "SDPA"}.get(form["impl"], "ours")


def _ms(microseconds: float) -> float:
    return float(f"{microseconds / 1e3:.6g}")


def _figures(ms: float) -> str:
    """Three figures: "411", "16.6", "0.0531"."""
    return f"{float(f'{ms:.3g}'):,.12g}"
