"""The sections of a report: which rows each shows, as pictures and tables.

A section is a function of one device's rows and of the stem of its pictures' names; it returns None
when there is nothing to show.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.report import charts_grid, charts_ops, charts_runs
from bench.report import tables as report_tables
from bench.report.rows import WHOLE_RUNS, Measurements, grouped, kind_of, name_of
from bench.report.tables import Table


class Block(NamedTuple):
    """Pictures and a table under one heading."""

    title: str = ""
    pictures: Sequence[Path] = ()
    table: Table | None = None


class Section(NamedTuple):
    """What a reader is told about the blocks, then the blocks."""

    text: str
    blocks: Sequence[Block]


def ops(found: Measurements, stem: str) -> Section | None:
    timed = {op: rows for (op,), rows in grouped(found.timed, "op").items()}
    blocks = []
    for table in report_tables.op_tables(found):
        op = table.title
        drawn = charts_ops.latency(Path(f"{stem}-{name_of(op)}"), timed[op]) if op in timed else ()
        blocks.append(Block(op, drawn, table))
    text = (
        "Every form of an op beside eager and what else a user could call: times on a logarithmic"
        " axis, rates from zero to the ceiling of the same run. Beside them, how many times"
        " faster the best of ours is than eager and than the best peer. Of an op with many cases"
        f" the first {charts_ops.MOST} are drawn."
    )
    return Section(text, blocks) if blocks else None


def roofline(found: Measurements, stem: str) -> Section | None:
    rows = [row for row in found.timed if row["copy_gb_s"] and row["gemm_tflop_s"]]
    if not rows:
        return None
    text = (
        "The FLOPs that are useful over the fewest bytes to move, against the FLOPs reached, below"
        " the measured copy bandwidth (slope) and matrix-product rate (flat). What fits a cache can"
        " lie above. Each op is named where it has most to do."
    )
    return Section(text, [Block(pictures=[charts_ops.roofline(Path(f"{stem}.png"), rows)])])


def heat_map(found: Measurements, stem: str) -> Section | None:
    pictures = []
    for base in charts_grid.BASES:
        if panels := charts_grid.grids(found.timed, base):
            pictures.append(charts_grid.heat(Path(f"{stem}-{base}.png"), panels, base))
    text = (
        "Decode of one group of rollouts: the best of ours against eager and against the best peer,"
        " over tokens of prefix and of suffix. Brown is slower; grey was not measured."
    )
    return Section(text, [Block(pictures=pictures)]) if pictures else None


def decode_steps(found: Measurements, stem: str) -> Section | None:
    parts = charts_runs.of_one_run(found.of("decode_part"))
    if not parts:
        return None
    steps = [row for row in found.timed if row["op"] == "decode_step"]
    picture = charts_runs.decode_parts(Path(f"{stem}.png"), parts, steps)
    text = (
        "What one decode step of a whole decoder is made of. Parts are measured under a profiler,"
        " the whole step and its roofline floor without."
    )
    return Section(text, [Block("", [picture], report_tables.part_table(parts))])


def occupancy(found: Measurements, stem: str) -> Section | None:
    rows = [row for row in found.of(*WHOLE_RUNS) if charts_runs.has_timeline(row)]
    if not rows:
        return None
    picture = charts_runs.timelines(Path(f"{stem}.png"), rows)
    text = "Rollouts that run (line) and tokens of KV in use (area) while a job goes on."
    return Section(text, [Block(pictures=[picture])])


def jobs(found: Measurements, stem: str) -> Section | None:
    blocks = [Block(table.title, (), table) for table in report_tables.job_tables(found)]
    text = "Whole answers, photos and images; steps of the engine; packing, replay, the scheduler."
    return Section(text, blocks) if blocks else None


def errors(found: Measurements, stem: str) -> Section | None:
    table = report_tables.error_table(found)
    text = "Largest errors, relative to max(rms(reference), |reference|), of what was not timed."
    return Section(text, [Block("", (), table)]) if table else None


def history(found: Measurements, stem: str) -> Section | None:
    rows = [row for row in (*found.older, *found.latest) if kind_of(row) in ("op", *WHOLE_RUNS)]
    cases = charts_runs.history(rows)
    if not cases:
        return None
    text = (
        "Median of the best of ours with p20..p80 at every commit that rows are there of, oldest"
        f" first; of each op the {charts_runs.MOST} cases that changed most, at the most."
    )
    return Section(text, [Block(pictures=charts_runs.small_multiples(Path(stem), cases))])


def others(found: Measurements, stem: str) -> Section | None:
    blocks = [Block(table.title, (), table) for table in report_tables.other_tables(found)]
    text = "Rows of kinds that have no section of their own, as they are."
    return Section(text, blocks) if blocks else None


SECTIONS: dict[str, Callable[[Measurements, str], Section | None]] = {
    "Ops": ops,
    "Roofline": roofline,
    "Heat map": heat_map,
    "Decode step": decode_steps,
    "Occupancy": occupancy,
    "Whole jobs and the engine": jobs,
    "Numerics": errors,
    "History": history,
    "Other rows": others,
}
