"""Summary of an ncu report: time, DRAM, tensor cores, occupancy and warp stalls of each kernel.

It is read from `ncu --import REPORT --page raw --csv`: a header with one column per metric, a row
of units, then a row per launch. The format follows a real export of 2022.3; from others' reports
are known: columns "Block Size" to "CC" in place of "Kernel Time" (2023 and later), units "us" and
"Gbyte/s", `dram__bytes_op_*` of consumer Blackwell, `subpipe` of its tensor cores (names as `ncu
--query-metrics` lists them). Metrics of tensor cores differ by architecture: the largest counts.
"""

import re
from collections.abc import Sequence

from model.errors import InputError
from model.terminal import table
from profiles.profilers.exports import Export, Row, Table
from profiles.profilers.numbers import DURATION, PERCENT, PLAIN, RATE, Kind

DURATIONS = ("gpu__time_duration.sum",)
DRAM_RATE = ("dram__bytes.sum.per_second",)
DRAM_READ, DRAM_WRITE = (
    [f"dram__bytes_{infix}{way}.sum.per_second" for infix in ("", "op_")]
    for way in ("read", "write")
)
DRAM_PEAK = (
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
)
TENSOR = re.compile(
    r"sm__(pipe_tensor(_(op|subpipe)_[a-z]+)?_cycles_active|inst_executed_pipe_tensor(_op_[a-z]+)?)"
    r"\.avg\.pct_of_peak_sustained_(active|elapsed)"
)
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
OCCUPANCY = ("sm__warps_active.avg.pct_of_peak_sustained_active",)
POSSIBLE = ("sm__maximum_warps_per_active_cycle_pct",)
REGISTERS = ("launch__registers_per_thread",)
TOP_STALLS = 3
# ncu does not clamp shares whose counters come from different passes, or that other engines of the
# GPU raise (Profiling Guide, "Range and Precision"). Twice the peak is out of reach of both; a
# number with a misread mark is 1,000 times too large. Warps are counted in one pass, and rounded.
SHARE = PERCENT._replace(most=200.0)
OCCUPIED = PERCENT._replace(most=101.0)
AGAIN = "export again with `LC_ALL=C ncu --import REPORT --page raw --csv`, with --c-locale"


def summarise(text: str, source: str, c_locale: bool = False) -> list[dict]:
    """One dict per launch, in order: kernel, duration_us, dram_gb_s, dram_pct and tensor_pct (of
    their peaks), occupancy_pct, possible_occupancy_pct, registers (per thread) and stalls.

    stalls: reason -> share of the time that a warp spends between two of its instructions, the
        largest first. Figures that were not collected are None.

    Raises InputError for a text that is no raw page, lacks the kernel's name or duration, or has
    impossible numbers.
    """
    kinds = {"raw": ("Kernel Name",)}
    export = Export(text, source, kinds, AGAIN, units_below=True, identity="ID", c_locale=c_locale)
    raw = export.tables["raw"]
    if not raw:
        raise InputError(
            f"{source}: this is not the output of `ncu --import REPORT --page raw --csv`"
        )
    if any(table.has("Metric Name") for table in raw):
        raise InputError(f"{source}: the CSV has one metric per line; export with --page raw --csv")
    for page in raw:
        page.column(DURATIONS[0])  # raises if it is missing
    launches = [_launch(page, row) for page in raw for row in page.rows]
    if not launches:
        reason = f"; {export.first_left_out}" if export.left_out else ""
        raise InputError(f"{source}: no row of units, or no launch after it{reason}")
    export.warn()
    return launches


def display(launches: Sequence[dict], source: str) -> None:
    """Print one line per launch."""
    header = ["kernel", " us", " DRAM GB/s", " of peak", " tensor", " occupancy", " possible"]
    header += [" registers", "warps wait for (share of their time)"]
    lines = [
        [
            launch["kernel"][:60],
            _text(launch["duration_us"], "{:,.2f}"),
            _text(launch["dram_gb_s"], "{:,.0f}"),
            *(
                _text(launch[name], "{:.1f} %")
                for name in ("dram_pct", "tensor_pct", "occupancy_pct", "possible_occupancy_pct")
            ),
            _text(launch["registers"], "{:.0f}"),
            ", ".join(f"{name} {share:.0%}" for name, share in launch["stalls"].items()),
        ]
        for launch in launches
    ]
    table(f"launches in {source}", header, lines)


def _first(page: Table, row: Row, names: Sequence[str], kind: Kind) -> float | None:
    """The first of these metrics that has a number."""
    values = (page.number(row, name, kind) for name in names if page.has(name))
    return next((value for value in values if value is not None), None)


def _all(page: Table, row: Row, pattern: re.Pattern, kind: Kind) -> dict[str, float]:
    """The metrics with a number whose whole name matches, by name."""
    names = filter(pattern.fullmatch, page.names)
    values = {name: page.number(row, name, kind) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _launch(page: Table, row: Row) -> dict:
    rate = _first(page, row, DRAM_RATE, RATE)
    if rate is None:
        read, write = (_first(page, row, names, RATE) for names in (DRAM_READ, DRAM_WRITE))
        rate = None if read is None or write is None else read + write
    return {
        "kernel": row.cells[page.column("Kernel Name")],
        "duration_us": _first(page, row, DURATIONS, DURATION),
        "dram_gb_s": rate,
        "dram_pct": _first(page, row, DRAM_PEAK, SHARE),
        "tensor_pct": max(_all(page, row, TENSOR, SHARE).values(), default=None),
        "occupancy_pct": _first(page, row, OCCUPANCY, OCCUPIED),
        "possible_occupancy_pct": _first(page, row, POSSIBLE, OCCUPIED),
        "registers": _first(page, row, REGISTERS, PLAIN),
        "stalls": _stalls(_all(page, row, STALL, PLAIN)),
    }


def _stalls(metrics: dict[str, float]) -> dict[str, float]:
    """Shares of the time between two instructions of a warp; "selected" is the issue itself."""
    stalls = {STALL.sub(r"\1", name): value for name, value in metrics.items()}
    total = sum(stalls.values())
    ordered = sorted(stalls.items(), key=lambda stall: -stall[1])
    reasons = [(name, value) for name, value in ordered if name != "selected" and value > 0]
    return {name: value / total for name, value in reasons[:TOP_STALLS]}


def _text(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
