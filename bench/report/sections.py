"""The sections of a report: the rows that each shows, as pictures and tables.

A section is a function of one device's rows and the stem of its pictures' paths. It returns None if
it has nothing to show.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.report import charts_grid, charts_ops, charts_runs
from bench.report import tables as report_tables
from bench.report.rows import Measurements, group_by, kind_of, slug
from bench.rows.columns import Table
from bench.rows.run_tables import RUNS


class Block(NamedTuple):
    """Pictures and a table under one heading."""

    title: str = ""
    pictures: Sequence[Path] = ()
    table: Table | None = None


class Section(NamedTuple):
    """An introduction for the reader, then blocks."""

    text: str
    blocks: Sequence[Block]


def ops(measurements: Measurements, stem: str) -> Section | None:
    timed = {op: rows for (op,), rows in group_by(measurements.timed, "op").items()}
    blocks = []
    for table in report_tables.op_tables(measurements):
        op = table.title
        pictures = charts_ops.latency(Path(f"{stem}-{slug(op)}"), timed[op]) if op in timed else ()
        blocks.append(Block(op, pictures, table))
    text = (
        "Left: median time of each implementation, on a logarithmic axis; bars show p20 to p80."
        " Right: rate, from zero to the ceiling measured in the same run, and the speed-up of our"
        " best form over eager (the definition) and over the best peer (another library). At most"
        f" {charts_ops.MAX_CASES} cases of an op are drawn, the first among its rows."
    )
    return Section(text, blocks) if blocks else None


def roofline(measurements: Measurements, stem: str) -> Section | None:
    rows = [row for row in measurements.timed if row["copy_gb_s"] and row["gemm_tflop_s"]]
    if not rows:
        return None
    text = (
        "Achieved FLOP/s over arithmetic intensity, the useful FLOPs per byte that must be moved."
        " The line is the measured copy bandwidth (slope) and matrix rate (flat). Data that fit"
        " into a cache can be above it. Each op is labelled at its case with the most FLOPs."
    )
    return Section(text, [Block(pictures=[charts_ops.roofline(Path(f"{stem}.png"), rows)])])


def heat_map(measurements: Measurements, stem: str) -> Section | None:
    pictures = []
    for base in charts_grid.BASES:
        if panels := charts_grid.grids(measurements.timed, base):
            pictures.append(charts_grid.heat(Path(f"{stem}-{base}.png"), panels, base))
    text = (
        "Decode attention of one group of rollouts: the speed-up of our best form over eager and"
        " over the best peer, by prefix and suffix length. Brown: slower. Green: faster. Grey: not"
        " measured."
    )
    return Section(text, [Block(pictures=pictures)]) if pictures else None


def decode_steps(measurements: Measurements, stem: str) -> Section | None:
    parts = charts_runs.parts_of_latest_commit(measurements.of("decode_part"))
    if not parts:
        return None
    steps = [row for row in measurements.timed if row["op"] == "decode_step"]
    picture = charts_runs.decode_parts(Path(f"{stem}.png"), parts, steps)
    text = (
        "Time of one decode step of a whole decoder, by part. The parts are measured with a"
        " profiler, the whole step and its roofline floor without."
    )
    return Section(text, [Block("", [picture], report_tables.part_table(parts))])


def occupancy(measurements: Measurements, stem: str) -> Section | None:
    rows = [row for row in measurements.of(*RUNS) if charts_runs.has_timeline(row)]
    if not rows:
        return None
    picture = charts_runs.timelines(Path(f"{stem}.png"), rows)
    text = "Running rollouts (line) and KV tokens in use (area) during a job."
    return Section(text, [Block(pictures=[picture])])


def jobs(measurements: Measurements, stem: str) -> Section | None:
    blocks = [Block(table.title, (), table) for table in report_tables.run_tables(measurements)]
    text = (
        "End-to-end answers, photos and images; engine steps; packing, replay, the scheduler; what"
        " folded weights and FP8 KV change."
    )
    return Section(text, blocks) if blocks else None


def errors(measurements: Measurements, stem: str) -> Section | None:
    table = report_tables.error_table(measurements)
    text = (
        "Largest errors of cases that were checked but not timed, relative to max(rms(reference),"
        " |reference|)."
    )
    return Section(text, [Block("", (), table)]) if table else None


def history(measurements: Measurements, stem: str) -> Section | None:
    rows = [
        row for row in (*measurements.older, *measurements.latest) if kind_of(row) in ("op", *RUNS)
    ]
    cases = charts_runs.history(rows)
    if not cases:
        return None
    text = (
        "Median time of our best form at each commit with rows, oldest first; bars show p20 to p80."
        f" At most {charts_runs.MAX_CASES} cases of an op are drawn, those that changed most."
    )
    return Section(text, [Block(pictures=charts_runs.small_multiples(Path(stem), cases))])


def others(measurements: Measurements, stem: str) -> Section | None:
    blocks = [Block(table.title, (), table) for table in report_tables.other_tables(measurements)]
    text = "Rows of all other kinds, with their values unchanged."
    return Section(text, blocks) if blocks else None


SECTIONS: dict[str, Callable[[Measurements, str], Section | None]] = {
    "Ops": ops,
    "Roofline": roofline,
    "Heat map": heat_map,
    "Decode step": decode_steps,
    "Occupancy": occupancy,
    "End-to-end jobs and engine": jobs,
    "Numerics": errors,
    "History": history,
    "Other rows": others,
}
