"""The tables of measured GPUs: one set for each folder of results that has a GPU's rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.rows.columns import Column, Table, make_table, markdown
from bench.rows.formats import number
from bench.rows.shapes import shape_of
from bench.studies.decode import FP8
from kernels.runtime.dispatch import IMPLS
from profiles.tables.figures import Row, folder, spread

UNLISTED = ("pairs", "launches", "linears")  # sections that serve decisions, not results
NONE_YET = "No GPU has been measured yet: no Triton kernel of this repository has run on one."


def gpus(results: Path) -> str:
    """Decode steps and ops of every GPU, or one line that says that none was measured."""
    parts: list[str] = []
    for path, rows in gpu_folders(results):
        parts += [_origin(path, rows), _decode_steps(rows), _ops(rows)]
    return "\n\n".join(filter(None, parts)) or NONE_YET


def gpu_folders(results: Path) -> list[tuple[Path, list[Row]]]:
    """The folders with rows of a GPU: the latest timed row of each op, case, impl and dtype."""
    folders = []
    for path in sorted(path for path in results.iterdir() if path.is_dir()):
        rows = _latest([row for row in folder(path) if not row["device"].endswith(" threads")])
        if rows:
            folders.append((path, rows))
    return folders


def _latest(rows: Sequence[Row]) -> list[Row]:
    """The last row of each op, case, impl and dtype, if it has a time and no failure."""
    key = ("op", "case", "impl", "dtype")
    listed = [row for row in rows if row.get("section") not in UNLISTED]
    of_key = {tuple(row.get(name) for name in key): row for row in listed}
    good = [row for row in of_key.values() if not row["failure"]]
    return [row for row in good if row["op"] == "roofline" or row.get("median_us")]


def _origin(path: Path, rows: Sequence[Row]) -> str:
    row = rows[-1]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    software = f"PyTorch {row['torch']}, Triton {row['triton']}, driver {row['driver']}"
    where = f"commit {commits}, `profiles/results/{path.name}/`"
    limits = [
        f"{row['dtype']} {row['copy_gb_s']:,.0f} GB/s, {row['gemm_tflop_s']:,.0f} TFLOP/s"
        for row in rows
        if row["op"] == "roofline"
    ]
    measured = f"; measured copy bandwidth and matrix rate: {'; '.join(limits)}" if limits else ""
    return f"**{row['device']}** ({software}, {where}{measured}):"


def _decode_steps(rows: Sequence[Row]) -> str:
    """A line per batch, prefix and suffix. MBU: minimum bytes over time and copy bandwidth."""
    steps: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["op"] == "decode_step":
            steps.setdefault(row["case"], {})[row["impl"]] = row
    lines = []
    for forms in steps.values():
        ours, eager, fp8 = (forms.get(name) for name in ("default", "eager", FP8))
        if not ours or not (shape := shape_of(ours)):
            continue
        lines.append(
            [
                shape["model"],
                *(f"{shape[name]:,}" for name in ("batch", "prefix", "suffix")),
                spread(eager) if eager else "",
                spread(ours),
                f"{shape['batch'] / ours['median_us'] * 1e6:,.0f}",
                _mbu(ours),
                *((spread(fp8), _mbu(fp8)) if fp8 else ("", "")),
            ]
        )
    header = ["decode step, ms (p20..p80)", " rollouts", " prefix", " suffix", " eager", " ours"]
    header += [" tokens/s", " MBU (measured)", " ours, FP8 KV", " MBU (measured)"]
    return markdown(Table("", header, lines)) if lines else ""


def _mbu(row: Row) -> str:
    return f"{row['bytes'] / row['median_us'] / 1e3 / row['copy_gb_s']:.0%}".replace("%", " %")


def _times(row: Mapping[str, Any]) -> str:
    return "{median_us:,.1f} ({p20_us:,.1f}..{p80_us:,.1f})".format_map(row)


def _peer_gain(row: Mapping[str, Any]) -> str | None:
    peer = row["peer"]
    return f"{peer['median_us'] / row['median_us']:.2f}x ({peer['impl']})" if peer else None


OP_COLUMNS = (
    Column("op", "op", "`{}`".format),
    Column("case", "case"),
    Column("impl", "impl"),
    Column(" us (p20..p80)", _times),
    Column(" roofline %", "roofline_pct", number(".0f", unit=" %")),
    Column(" times faster than eager", "eager_gain", number(".1f", unit="x")),
    Column(" times faster than the fastest peer", _peer_gain),
)


def _ops(rows: Sequence[Row]) -> str:
    """A line per case and Triton form, compared with eager and the fastest peer."""
    compared = []
    for row in rows:
        if not str(row.get("impl")).startswith("triton"):
            continue
        same = [r for r in rows if all(r.get(k) == row[k] for k in ("op", "case", "dtype"))]
        eager = next((r["median_us"] for r in same if r["impl"] == "eager"), None)
        peers = [r for r in same if r["impl"].partition("-")[0] not in IMPLS]
        fastest = min(peers, key=lambda r: r["median_us"], default=None)
        gain = eager / row["median_us"] if eager else None
        compared.append({**row, "eager_gain": gain, "peer": fastest})
    return markdown(make_table("", OP_COLUMNS, compared)) if compared else ""
