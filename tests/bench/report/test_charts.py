"""The pictures of measured rows: they agree with the rows and are readable."""

from itertools import combinations
from math import log2

import numpy as np
import pytest

from bench.report import charts, charts_grid, charts_ops, charts_runs
from bench.report import rows as report_rows
from bench.suite import PEERS
from tests.support.report_rows import every_kind, heat, part, row

pytest.importorskip("matplotlib")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would be saved; nothing is written."""
    figures = []
    for module in (charts_ops, charts_grid, charts_runs):
        monkeypatch.setattr(module, "save", lambda figure, path: figures.append(figure) or path)
    yield figures
    for figure in figures:
        charts.pyplot().close(figure)


def complete(rows):
    """The latest rows of the first device, with all their fields."""
    return report_rows.by_device(rows)[0].latest


def marks(axes):
    """(x, y, colour, whether filled) of each point with a marker."""
    return [
        (x, y, line.get_color(), line.get_markerfacecolor() == line.get_color())
        for line in axes.lines
        if line.get_marker() not in ("None", "", None)
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    ]


def assert_readable(figure):
    """No text is cut off by the picture's edge, and no two texts of an axes overlap."""
    figure.canvas.draw()
    page = figure.bbox.padded(1)
    for axes in figure.axes:
        if not axes.get_visible():
            continue
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        texts = [
            *(t.label1 for t in axes.xaxis.get_major_ticks() if left <= t.get_loc() <= right),
            *(
                t.label1
                for t in axes.yaxis.get_major_ticks()
                if min(low, high) <= t.get_loc() <= max(low, high)
            ),
            *(axes.texts),
            *(axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label),
        ]
        boxes = {t: t.get_window_extent() for t in texts if t.get_text() and t.get_visible()}
        for text, box in boxes.items():
            assert page.contains(box.x0, box.y0), text.get_text()
            assert page.contains(box.x1, box.y1), text.get_text()
        for (text, a), (other, b) in combinations(boxes.items(), 2):
            flat = text.get_rotation() == other.get_rotation() == 0
            assert not (flat and a.overlaps(b)), (text.get_text(), other.get_text())


def test_latency_draws_the_rows(drawn, tmp_path):
    """Guards the picture of times: medians, whiskers, rates, ceiling, speed-ups."""
    rows = complete(heat("B16 P512 S128", 800.0, 100.0, 250.0))
    charts_ops.latency(tmp_path / "ops", rows)
    left, right = drawn[0].axes
    by_impl = {r["impl"]: r for r in rows}
    order = ["eager", "sdpa", "fa3", "triton", "portable"]  # top to bottom: ours last
    assert [x for x, *_ in sorted(marks(left), key=lambda point: point[1])] == [
        by_impl[name]["median_us"] for name in order
    ]
    whiskers = {tuple(line.get_xdata()) for line in left.lines if len(line.get_xdata()) == 2}
    assert whiskers == {(r["p20_us"], r["p80_us"]) for r in rows}
    rates = {x for x, *_ in marks(right)}
    assert rates == {r["bytes"] / r["median_us"] / 1e3 for r in rows}
    (ceiling,) = {line.get_xdata()[0] for line in right.lines if line.get_linestyle() == "--"}
    assert ceiling == 4000.0 and "GB/s" in right.get_xlabel()
    assert [text.get_text() for text in right.texts] == ["8.00 × eager\n2.50 × peer"]
    assert left.get_xscale() == "log" and right.get_xlim()[0] <= 0


def test_rate_is_that_of_the_bound(drawn, tmp_path):
    """Guards the unit of the rates: FLOP/s for compute-bound ops."""
    rows = complete([row("projector", "1x 36x36", "triton", 200.0, 4e6, 7e10)])
    charts_ops.latency(tmp_path / "ops", rows)
    right = drawn[0].axes[1]
    assert "TFLOP/s" in right.get_xlabel() and marks(right)[0][0] == pytest.approx(350.0)


def test_ours_is_emphasised(drawn, tmp_path):
    """Guards the emphasis: ours filled and vermillion, eager hollow and grey, in both pictures."""
    rows = complete(heat("B16 P512 S128", 800.0, 100.0))
    charts_ops.latency(tmp_path / "ops", rows)
    charts_ops.roofline(tmp_path / "roof.png", rows)
    for figure in drawn:
        axes = figure.axes[0]
        ours, eager = (
            {(colour, filled) for x, y, colour, filled in marks(axes) if colour == expected}
            for expected in (charts.OURS, charts.EAGER)
        )
        assert ours == {(charts.OURS, True)} and eager == {(charts.EAGER, False)}


def test_peers_can_be_told_apart():
    """Guards against a new peer drawn like another peer of the same op, or like ours."""
    for op, names in PEERS.items():
        looks = [charts.marker_style({"impl": name, "version": None}) for name in ("eager", *names)]
        looks += [
            charts.marker_style({"impl": name, "version": None}) for name in ("portable", "triton")
        ]
        keys = {(m["color"], m["marker"], m.get("markerfacecolor")) for m in looks}
        assert len(keys) == len(looks), op


def test_many_cases_fill_pages(drawn, tmp_path):
    """Guards printing: no picture is taller than a page, no case is drawn twice or split."""
    rows = [
        row("prefix_attention", f"B{b} P512 S128", impl, b * k)
        for b in range(1, 40)
        for k, impl in enumerate(("eager", *PEERS["prefix_attention"], "triton"), start=1)
    ]
    paths = charts_ops.latency(tmp_path / "ops", complete(rows))
    labels = [text.get_text() for figure in drawn for text in figure.axes[0].get_yticklabels()]
    assert labels == [f"B{b} P512 S128" for b in range(1, charts_ops.MAX_CASES + 1)]
    assert len(paths) == len(set(paths)) == len(drawn) > 1
    assert max(figure.get_figheight() for figure in drawn) <= charts.MAX_HEIGHT
    assert_readable(drawn[0])


def test_roofline_draws_the_rows(drawn, tmp_path):
    """Guards the roofline: the measured roof, its knee, and the position of each row."""
    eager, ours = rows = complete(
        [
            row("projector", "1x 36x36", "eager", 400.0, 4e6, 7e10),
            row("projector", "1x 36x36", "triton", 200.0, 4e6, 7e10),
        ]
    )
    charts_ops.roofline(tmp_path / "roof.png", rows)
    (axes,) = drawn[0].axes
    assert {(x, y) for x, y, *_ in marks(axes)} == {
        (7e10 / 4e6, 7e10 / r["median_us"] / 1e6) for r in (eager, ours)
    }
    roof = next(line for line in axes.lines if len(line.get_xdata()) > 2)
    expected = np.minimum(4.0 * roof.get_xdata(), 700.0)
    assert np.allclose(roof.get_ydata(), expected) and roof.get_ydata().max() == 700.0
    assert roof.get_xdata().min() < 700 / 4 < roof.get_xdata().max()
    assert [text.get_text() for text in axes.texts] == ["projector"]


def test_roofline_has_a_panel_per_dtype(drawn, tmp_path):
    """Guards against fp32 rows below the roof of bf16."""
    rows = heat("B16 P512 S128", 800.0, 100.0)
    rows += [r | {"dtype": "float32", "gemm_tflop_s": 50.0} for r in rows]
    charts_ops.roofline(tmp_path / "roof.png", complete(rows))
    assert [axes.get_title(loc="left").split(":")[0] for axes in drawn[0].axes] == [
        "bfloat16",
        "float32",
    ]
    assert [max(axes.lines[0].get_ydata()) for axes in drawn[0].axes] == [700.0, 50.0]


@pytest.mark.parametrize(
    ("case", "title", "cell"),
    [
        ("B16 P2048 S128", "B16, 32/8 heads of 128, bfloat16", (2048, 128)),
        ("smollm2 B16 P512 S64", "B16, 9/3 heads of 64, bfloat16", (512, 64)),
        ("B16 P2048 S512 fp8", "B16, 32/8 heads of 128, FP8 KV, bfloat16", (2048, 512)),
        ("pacore low B4 P1024 S6000", "B4, 32/8 heads of 128, bfloat16", (1024, 6000)),
        (
            "B32 P4096 S512 fp8 window 512",
            "B32, 32/8 heads of 128, FP8 KV, window 512, bfloat16",
            (4096, 512),
        ),
        ("4 x (B4 P512 S64)", None, None),
        ("ragged B32 P2048 S64..1056", None, None),
        ("prefill 2048 behind 8192", None, None),
    ],
)
def test_names_of_the_grid(case, title, cell):
    """Guards which cases become points of a heat map, and in which panel."""
    other = case.replace("S", "S1") if title else "B1 P1 S1"
    panels = charts_grid.grids(complete(heat(case, 80.0, 10.0) + heat(other, 9.0, 1.0)), "eager")
    assert [panel.title for panel in panels] == ([title] if title else [])
    assert not title or panels[0].cells[cell] == 8.0


def test_heat_map_shows_its_numbers(drawn, tmp_path):
    """Guards the cells: the speed-up of our best form over eager or the best peer."""
    points = {(512, 128): (800.0, 100.0, 250.0), (2048, 128): (3000.0, 60.0, 30.0)}
    points |= {(2048, 512): (70.0, 70.0, None)}
    rows = [r for (p, s), times in points.items() for r in heat(f"B16 P{p} S{s}", *times)]
    expected = {"eager": {(0, 0): "8", (1, 0): "50", (1, 1): "1"}}
    expected["peer"] = {(0, 0): "2.5", (1, 0): "0.5"}
    for base, cells in expected.items():
        charts_grid.heat(tmp_path / "a.png", charts_grid.grids(complete(rows), base), base)
        axes = drawn[-1].axes[0]
        assert {text.xy: text.get_text() for text in axes.texts} == cells
        colours = axes.images[0].get_array()
        assert {(x, y): colours[y, x] for x, y in cells} == pytest.approx(
            {cell: log2(float(text)) for cell, text in cells.items()}
        )
        assert axes.images[0].norm.vmin == -axes.images[0].norm.vmax  # 1 is the middle
        assert_readable(drawn[-1])
    assert [label.get_text() for label in drawn[0].axes[0].get_xticklabels()] == ["512", "2,048"]


def test_peers_that_were_not_measured_have_no_map():
    """Guards against an empty panel if no peer was measured."""
    rows = complete(heat("B1 P8 S8", 8.0, 1.0) + heat("B1 P9 S8", 8.0, 1.0))
    assert charts_grid.grids(rows, "eager") and not charts_grid.grids(rows, "peer")


def test_decode_parts_add_up(drawn, tmp_path):
    """Guards the bars: their lengths and positions, the step's floor and its time."""
    rows = complete(every_kind())
    parts = [r for r in rows if r["op"] == "decode_part"]
    (step,) = steps = [r for r in rows if r["op"] == "decode_step"]
    charts_runs.decode_parts(tmp_path / "a.png", parts, steps)
    (axes,) = drawn[0].axes
    bars = [(bar.get_x(), bar.get_width(), round(bar.get_y() + 0.31)) for bar in axes.patches]
    assert bars == [(0.0, 30.0, 0), (30.0, 12.0, 0), (0.0, 31.0, 1)]
    floor, whole = axes.lines
    assert list(floor.get_xdata()) == pytest.approx([step["flops"] / 7e8] * 2)
    assert list(whole.get_xdata()) == [step["median_us"]] and list(whole.get_ydata()) == [0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["default", "eager"]
    assert_readable(drawn[0])


def test_parts_of_two_runs_are_not_added():
    """Guards a step whose parts have changed: only the latest commit's parts are added up."""
    case = "tiny B4 P256 S64"
    old = [part(case, "default", "attention", 9.0, commit="a" * 12, time="2026-11-26T10:00:00Z")]
    new = [part(case, "default", "linear", 30.0), part(case, "default", "other", 2.0)]
    parts = charts_runs.parts_of_latest_commit(complete(old + new))
    assert [row["part"] for row in parts] == ["linear", "other"]


def test_timelines_draw_the_rows(drawn, tmp_path):
    """Guards the timeline: rollouts as the line, KV as the area, on separate axes."""
    timeline = {"seconds": [0.0, 1.0, 2.5], "running": [1, 16, 3], "kv_tokens": [100, 900, 400]}
    rows = [row("pacore", "tiny", impl, 2e6, timeline=timeline) for impl in ("eager", "default")]
    charts_runs.timelines(tmp_path / "a.png", rows)
    panels, right = drawn[0].axes[:2], drawn[0].axes[2:]
    assert [axes.get_title(loc="left") for axes in panels] == ["tiny, eager", "tiny, default"]
    for axes in right:
        line = axes.lines[0]
        assert list(line.get_xdata()) == [0.0, *timeline["seconds"]]
        assert list(line.get_ydata()) == [1, *timeline["running"]]
        assert line.get_drawstyle() == "steps-pre", "a step's state is constant while it runs"
        assert axes.get_ylim()[1] > 16
    area = panels[0].collections[0].get_paths()[0].vertices
    assert {y for x, y in area if 1.0 < x <= 2.5} == {0, 400}
    assert {y for x, y in area if 0.0 < x < 1.0} <= {0, 900}
    assert {y for _, y in area} == {0, *timeline["kv_tokens"]}


@pytest.mark.parametrize(
    "timeline",
    [
        None,
        [1, 2],
        {"seconds": [1, 2], "running": [1, 2]},
        {"seconds": [1, 2], "running": [1], "kv_tokens": [1, 2]},
        {"seconds": [1, 2], "running": [1, "x"], "kv_tokens": [1, 2]},
        {"seconds": [1, 2], "running": [1, None], "kv_tokens": [1, 2]},
        {"seconds": [1], "running": [1], "kv_tokens": [1]},
    ],
)
def test_timelines_that_cannot_be_drawn(timeline):
    """Guards the report against malformed timelines."""
    assert not charts_runs.has_timeline({"timeline": timeline})


def test_history_is_the_best_of_ours_by_time(drawn, tmp_path):
    """Guards the history: one point per commit, our best form at that commit, in time order."""

    def at(hour, commit, impl, us, **more):
        time = f"2026-11-27T{hour:02}:00:00Z"
        return row("rms_norm", "T1 C64", impl, us, time=time, commit=commit, **more)

    rows = [
        at(12, "c" * 12, "triton", 10.0),
        at(12, "c" * 12, "portable", 14.0),
        at(9, "a" * 12, "eager", 5.0),
        at(9, "a" * 12, "portable", 30.0),
        at(10, "b" * 12, "triton", 25.0),
        at(11, "b" * 12, "triton", 21.0),  # measured again
        at(13, "d" * 12, "fa3", 1.0),
        row("rms_norm", "T2 C64", "triton", 1.0),  # at one commit only
    ]
    (measurements,) = report_rows.by_device(rows)
    ((*points,),) = charts_runs.history([*measurements.older, *measurements.latest])
    assert [point["median_us"] for point in points] == [30.0, 21.0, 10.0]
    charts_runs.small_multiples(tmp_path / "history", [points])
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "aaaaaaa",
        "bbbbbbb",
        "ccccccc",
    ]
    assert list(axes.lines[0].get_ydata()) == [30.0, 21.0, 10.0]
    assert axes.get_ylim()[0] == 0
    assert_readable(drawn[0])


def test_history_of_many_cases_keeps_what_changed(drawn, tmp_path):
    """Guards against a history of hundreds of panels: only the cases that changed most."""
    rows = [
        row("rms_norm", f"T{n} C64", "triton", 100.0 + n * late, commit="ab"[late] * 12)
        for n in range(40)
        for late in (0, 1)
    ]
    cases = charts_runs.history([r for commit in (0, 1) for r in complete(rows[commit::2])])
    names = {points[0]["case"] for points in cases}
    assert names == {f"T{n} C64" for n in range(40 - charts_runs.MAX_CASES, 40)}
    paths = charts_runs.small_multiples(tmp_path / "history", cases + cases)
    assert len(paths) == len(drawn) == 2 and paths[0] != paths[1]


def test_long_names_are_readable(drawn, tmp_path):
    """Guards labels against being cut off or overlapping: long names, near values, tiny ranges."""
    long = "1x 1x1 + 1x 13x9 + 4x 36x36 + 1x 52x52 H16 D96 scattered"
    rows = complete(
        [
            row("vision_attention", long, "eager", 1000.0),
            row("vision_attention", long, "triton", 990.0),
            *(row(op, "T1", "triton", 5.0 + n) for n, op in enumerate(("rms_norm", "silu_mul"))),
            row("linear_quick_gelu", "T1", "triton", 250.0, 4e6, 7e10),
            row("vision_attention", "1x 36x36", "triton", 240.0, 4e6, 7e10),
        ]
    )
    charts_ops.latency(tmp_path / "ops", rows)
    charts_ops.roofline(tmp_path / "roof.png", rows)
    for figure in drawn:
        assert_readable(figure)


@pytest.mark.parametrize("low", [1.0, 1.3, 2.1, 4.9, 7.7, 9.6])
@pytest.mark.parametrize("ratio", [1.69, 3.0, 12.0, 1e3, 1e6])
def test_ticks_of_times(low, ratio):
    """Guards time axes against having one tick, or overlapping labels."""
    ticks = charts.round_ticks(low, low * ratio)
    assert 2 <= len(ticks) <= 5 and low <= min(ticks) <= max(ticks) <= low * ratio


@pytest.mark.parametrize(
    ("us", "text"),
    [(0, "0"), (0.25, "250 ns"), (20, "20 µs"), (1500, "1.5 ms"), (2e6, "2 s"), (7.2e9, "7,200 s")],
)
def test_durations(us, text):
    """Guards the unit of an axis."""
    assert charts.format_duration(us) == text
