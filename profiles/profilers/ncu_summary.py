"""Summary of an ncu report: time, DRAM, tensor cores, occupancy and warp stalls of each kernel.

It is read from `ncu --import REPORT --page raw --csv`: a header with one column per metric, a row
of units, then a row per launch. The format follows a real export of 2022.3, which spells units
"usecond" and "Gbyte/second"; later versions' "us" and "Gbyte/s" are from published excerpts.
Metrics of tensor cores have different names on different architectures: the largest one counts.
"""

import re
from collections.abc import Sequence

from model.errors import InputError
from model.terminal import table
from profiles.profilers.exports import Table, number, tables

DURATION = "gpu__time_duration.sum"
DRAM_RATE = ("dram__bytes.sum.per_second",)
DRAM_PARTS = ("dram__bytes_read.sum.per_second", "dram__bytes_write.sum.per_second")
DRAM_PEAK = (
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
)
TENSOR = re.compile(
    r"sm__(pipe_tensor(_op_[a-z]+)?_cycles_active|inst_executed_pipe_tensor(_op_[a-z]+)?)"
    r"\.avg\.pct_of_peak_sustained_(active|elapsed)"
)
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
OCCUPANCY = ("sm__warps_active.avg.pct_of_peak_sustained_active",)
POSSIBLE = ("sm__maximum_warps_per_active_cycle_pct",)
REGISTERS = ("launch__registers_per_thread",)
SCALE = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
UNIT = re.compile(r"([numKMGT]?)(seconds?|s|bytes?|B)(/(second|s))?")
TOP_STALLS = 3


def summarise(text: str, source: str) -> list[dict]:
    """One dict per launch, in order: kernel, duration_us, dram_gb_s, dram_pct and tensor_pct (of
    their peaks), occupancy_pct, possible_occupancy_pct, registers (per thread) and stalls.

    stalls: reason -> share of the time that a warp spends between two of its instructions, the
        largest first. Figures that were not collected are None.

    Raises InputError for a text that is no raw page or lacks the kernel's name or duration.
    """
    raw = [t for t in tables(text, source) if t.has("Kernel Name")]
    if not raw:
        raise InputError(
            f"{source}: this is not the output of `ncu --import REPORT --page raw --csv`"
        )
    if raw[0].has("Metric Name"):
        raise InputError(f"{source}: the CSV has one metric per line; export with --page raw --csv")
    header = raw[0].header
    units, *launches = raw[0].rows or [()]
    raw[0].texts(DURATION)  # raises if it is missing
    if not launches or units[header.index("Kernel Name")]:
        raise InputError(f"{source}: no row of units, or no launch after it")
    return [_launch(_Row(raw[0], units, cells)) for cells in launches]


def display(launches: Sequence[dict], source: str) -> None:
    """Print one line per launch."""
    header = ["kernel", " us", " DRAM GB/s", " of peak", " tensor", " occupancy", " possible"]
    header += [" registers", "warps wait for (share of their time)"]
    lines = [
        [
            launch["kernel"][:60],
            f"{launch['duration_us']:,.2f}",
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


class _Row:
    """The figures of one launch, by metric."""

    def __init__(self, table_: Table, units: Sequence[str], cells: Sequence[str]) -> None:
        names = list(table_.header)
        self.texts = dict(zip(names, cells, strict=True))
        self.units = dict(zip(names, units, strict=True))

    def first(self, names: Sequence[str]) -> float | None:
        """The first of these metrics that has a number, converted to seconds or bytes if its unit
        is one of time or size."""
        for name in names:
            value = number(self.texts.get(name, ""))
            if value is not None:
                unit = UNIT.fullmatch(self.units[name])
                return value * SCALE[unit[1]] if unit else value
        return None

    def all(self, pattern: re.Pattern) -> dict[str, float]:
        """The metrics whose whole name matches, by name."""
        values = {
            name: number(text) for name, text in self.texts.items() if pattern.fullmatch(name)
        }
        return {name: value for name, value in values.items() if value is not None}


def _launch(row: _Row) -> dict:
    duration, rate = row.first([DURATION]), row.first(DRAM_RATE)
    if rate is None:
        parts = [part for name in DRAM_PARTS if (part := row.first([name])) is not None]
        rate = sum(parts) if len(parts) == len(DRAM_PARTS) else None
    return {
        "kernel": row.texts["Kernel Name"],
        "duration_us": None if duration is None else duration * 1e6,
        "dram_gb_s": None if rate is None else rate / 1e9,
        "dram_pct": row.first(DRAM_PEAK),
        "tensor_pct": max(row.all(TENSOR).values(), default=None),
        "occupancy_pct": row.first(OCCUPANCY),
        "possible_occupancy_pct": row.first(POSSIBLE),
        "registers": row.first(REGISTERS),
        "stalls": _stalls(row),
    }


def _stalls(row: _Row) -> dict[str, float]:
    """Shares of the time between two instructions of a warp; "selected" is the issue itself."""
    metrics = row.all(STALL).items()
    stalls = {match[1]: value for name, value in metrics if (match := STALL.fullmatch(name))}
    total = sum(stalls.values())
    ordered = sorted(stalls.items(), key=lambda stall: -stall[1])
    reasons = [(name, value) for name, value in ordered if name != "selected" and value > 0]
    return {name: value / total for name, value in reasons[:TOP_STALLS]}


def _text(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
