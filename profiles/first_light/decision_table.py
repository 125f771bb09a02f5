"""What the first measurements on a GPU say, and what to do next. Imports no torch.

A table with one entry for each question, in the order in which they matter. Why these limits:

- Where numbers are wrong or a kernel hangs, no time of it means anything.
- Decode attention takes t = a + bytes / w. w is what streaming KV reaches; below 85 % of the copy
  rate the loop over KV is at fault. If only 64 rollouts are slow, it is their many tiles of 16
  rows, which share launches and registers with the large ones; else it is the loop itself.
- a is what a call costs before and after that: finding the work, the first page, the merge. It
  should be 3 us or so, and a step of 16 rollouts has little more than 14 us of reading to hide it.
  Tuning block sizes cannot lower it, records of pieces and an earlier start can.
- `ahead` takes the load of the page id out of the pipeline of K and V loads. If it gains less than
  3 % on every case, the pipeline is not what programs wait for, and the next ideas fall with it.
- A step has some 250 launches: above 2.5 us each they cost as much as attention.
- Linear layers are 85 % of a step. The library's products may leave 12 % of the copy rate unused;
  products of our own that stream the weights should reach 90 to 93 %.
- Vision attention, without the launch that rotates Q and K (its traffic at copy rate), is bound by
  tensor cores, exponentials and instructions alike: 430 to 470 TFLOP/s were predicted. Below 400
  something stands in the way that tuning does not find; above 480 only the rotation is left.
- FP8 halves the bytes but converts every element. Converting to bf16 is dear, to fp16 cheap.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from profiles.first_light.line_fit import Line, fit
from profiles.runs.task import NOT_STARTED, Row

MEASURING = ("numerics", "tests", "pairs", "ops", "decode", "engine", "vision")
OURS = ("triton", "portable", "default", "None")  # what forms that count as wrong begin with
BATCHES = (16, 64)
FP8_CASE = "B16 P2048 S512"
Reading = tuple[tuple[float, ...], str]  # what limits are for, and how a person is told
Rule = tuple[Callable[..., bool], str]


def always(*_: float) -> bool:
    return True


@dataclass(frozen=True)
class Decision:
    """A question: how rows answer it, None if they do not, and the first rule that holds says what
    to do."""

    question: str
    read: Callable[[Sequence[Row]], Reading | None]
    rules: tuple[Rule, ...]

    def line(self, rows: Sequence[Row]) -> str:
        """As in "launch in a graph: 1.8 us -> launches are cheap: attention comes first"."""
        reading = self.read(rows)
        if reading is None:
            return f"{self.question}: not measured"
        values, text = reading
        then = next(then for holds, then in self.rules if holds(*values))
        return f"{self.question}: {text} -> {then}"


def decisions(rows: Iterable[Row]) -> list[str]:
    """One line for each entry of the table, from the rows of one device and commit."""
    found = latest(rows)
    return [decision.line(found) for decision in TABLE]


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of each measurement the last row. What failed as a whole counts until a form has a row."""
    found: dict[tuple, Row] = {}
    for row in rows:
        task = tuple(row.get(name) for name in ("section", "op", "case", "dtype"))
        found.pop((*task, None), None)
        found[*task, row.get("impl")] = row
    return list(found.values())


def attention_lines(rows: Sequence[Row], pair: str) -> dict[int, Line]:
    """By rollouts, the line through the times of decode attention in one form of its pairs."""
    found = {}
    for batch in BATCHES:
        of_batch = [row for row in _timed(rows, pair) if _decodes(row, batch)]
        if line := fit([(row["bytes"], row["median_us"]) for row in of_batch]):
            found[batch] = line
    return found


def gains(rows: Sequence[Row], switch: str, old: str = "0", new: str = "1") -> dict[str, float]:
    """Percent of its time that a case of attention saves by a switch."""
    before = {row["case"]: row["median_us"] for row in _timed(rows, f"{switch} {old}")}
    after = {row["case"]: row["median_us"] for row in _timed(rows, f"{switch} {new}")}
    return {case: 100 * (1 - after[case] / us) for case, us in before.items() if case in after}


def copy_rate(rows: Sequence[Row]) -> float:
    """GB/s, as each process that timed something measured it."""
    return fmean(row["copy_gb_s"] for row in rows)


def _wrong(rows: Sequence[Row]) -> Reading | None:
    of_sections = [row for row in rows if row.get("section") in MEASURING]
    if not any(row["section"] == "numerics" for row in of_sections):
        return None
    failed = [row for row in of_sections if _failed(row)]
    names = ", ".join(dict.fromkeys(row["op"] for row in failed))
    return (len(failed),), f"{len(failed)} ({names})" if failed else "none"


def _rates(rows: Sequence[Row]) -> Reading | None:
    found = _lines(rows)
    if found is None:
        return None
    copy = copy_rate(good(rows, "pairs"))
    percent = [100 * line.gb_s / copy for line in found]
    told = zip(BATCHES, found, percent, strict=True)
    text = ", ".join(f"B{batch} {line.gb_s:,.0f} GB/s ({pct:.0f} %)" for batch, line, pct in told)
    return tuple(percent), text


def _starts(rows: Sequence[Row]) -> Reading | None:
    found = _lines(rows)
    if found is None:
        return None
    told = zip(BATCHES, found, strict=True)
    text = ", ".join(f"B{batch} {line.start_us:.1f} us" for batch, line in told)
    return (max(line.start_us for line in found),), text


def _ahead(rows: Sequence[Row]) -> Reading | None:
    found = gains(rows, "ahead").values()
    if not found:
        return None
    return (max(found),), f"{min(found):+.1f} to {max(found):+.1f} %, cases: {len(found)}"


def _launch(rows: Sequence[Row]) -> Reading | None:
    found = [row["median_us"] for row in good(rows, "launches")]
    return ((found[-1],), f"{found[-1]:.2f} us") if found else None


def _linears(rows: Sequence[Row]) -> Reading | None:
    """Of a step with 16 rows; the others are told."""
    of_rows: dict[int, list[Row]] = {}
    for row in good(rows, "linears"):
        of_rows.setdefault(row["rows"], []).append(row)
    shares = {count: _share(of) for count, of in sorted(of_rows.items()) if len(of) == 5}
    if 16 not in shares:
        return None
    worst = min(of_rows[16], key=lambda row: row["copy_pct"])
    sums = ", ".join(f"{count} rows {share:.0f} %" for count, share in shares.items())
    return (shares[16],), f"{sums} ({worst['case']} {worst['copy_pct']:.0f} %)"


def _share(of_step: Sequence[Row]) -> float:
    """Percent of the copy rate over all products of a step."""
    num_bytes, us = (
        sum(row["per_step"] * row[name] for row in of_step) for name in ("bytes", "median_us")
    )
    return 100 * num_bytes / us / 1e3 / copy_rate(of_step)


def _vision(rows: Sequence[Row]) -> Reading | None:
    found = [row for row in _timed(rows, "rule") if row["op"] == "vision_attention"]
    if not found:
        return None
    row = found[-1]
    # Q and K are read and written, as many elements as the op has in and out; K alone if Q is
    # rotated by the attention itself.
    moved = row["bytes"] / (2 if (row["tiles"] or {}).get("turn_q") else 1)
    us = row["median_us"] - moved / row["copy_gb_s"] / 1e3
    if us <= 0:
        return None
    rate = row["flops"] / us / 1e6
    return (rate,), f"{rate:,.0f} TFLOP/s without its rotation"


def _fp8(rows: Sequence[Row]) -> Reading | None:
    def us(pair: str, case: str) -> float | None:
        return next((row["median_us"] for row in _timed(rows, pair) if row["case"] == case), None)

    bf16, fp8_case = us("rule", FP8_CASE), f"{FP8_CASE} fp8"
    plain, fp16 = us("rule", fp8_case) or us("fp16 0", fp8_case), us("fp16 1", fp8_case)
    if bf16 is None or plain is None:
        return None
    told = f", {fp16:.1f} us with products in fp16" if fp16 else ""
    return (bf16, plain, fp16 or math.inf), f"{plain:.1f} us{told}; bf16 {bf16:.1f} us"


def _lines(rows: Sequence[Row]) -> list[Line] | None:
    """Of the form with `ahead`, of the rule where there is no such."""
    for pair in ("ahead 1", "rule"):
        found = attention_lines(rows, pair)
        if len(found) == len(BATCHES):
            return [found[batch] for batch in BATCHES]
    return None


def _timed(rows: Sequence[Row], pair: str) -> list[Row]:
    return [row for row in good(rows, "pairs") if row.get("pair") == pair]


def good(rows: Sequence[Row], section: str) -> list[Row]:
    """A section's rows with a time and right numbers."""
    of_section = [row for row in rows if row.get("section") == section]
    return [row for row in of_section if not row["failure"] and row.get("median_us")]


def _decodes(row: Row, batch: int) -> bool:
    return row["op"] == "prefix_attention" and bool(
        re.fullmatch(rf"B{batch} P\d+ S\d+", row["case"])
    )


def _failed(row: Row) -> bool:
    failure = row["failure"] or NOT_STARTED
    return not failure.startswith(NOT_STARTED) and str(row.get("impl")).startswith(OURS)


TABLE = (
    Decision(
        "wrong numbers or hangs",
        _wrong,
        (
            (lambda cases: cases == 0, "go on to speed"),
            (
                always,
                "run the smallest such case under compute-sanitizer, then this again; no tuning",
            ),
        ),
    ),
    Decision(
        "rate of decode attention, of copy",
        _rates,
        (
            (lambda b16, b64: min(b16, b64) >= 85, "fine"),
            (
                lambda b16, b64: b16 >= 85,
                "tiles of 16 rows in a launch of their own (`split`)",
            ),
            (always, "profile the loop of 16-row tiles with ncu: what does it wait for?"),
        ),
    ),
    Decision(
        "fixed cost of decode attention",
        _starts,
        (
            (lambda us: us <= 6, "fine: tune tiles"),
            (always, "once the rate is fine: `pieces` and `pdl` where they gain, before tuning"),
        ),
    ),
    Decision(
        "gain by loading the page id early (`ahead`)",
        _ahead,
        (
            (
                lambda most: most < 3,
                "not what programs wait for: read the stalls at DEPBAR (ncu) before all else",
            ),
            (always, "keep `ahead`, and drop the old form"),
        ),
    ),
    Decision(
        "launch in a graph",
        _launch,
        (
            (lambda us: us > 2.5, "earlier starts (`pdl`) and fusion come before attention"),
            (always, "launches are cheap: attention comes first"),
        ),
    ),
    Decision(
        "linear layers of a step, of copy",
        _linears,
        (
            (
                lambda pct: pct < 88,
                "write a product that streams weights: worth more than all else",
            ),
            (always, "leave them to the library"),
        ),
    ),
    Decision(
        "vision attention",
        _vision,
        (
            (lambda rate: rate < 400, "profile it with ncu"),
            (lambda rate: rate <= 480, "tune its tiles"),
            (always, "only try to rotate Q in the kernel (`turn_q`)"),
        ),
    ),
    Decision(
        "attention over FP8 KV",
        _fp8,
        (
            (lambda bf16, plain, fp16: plain <= bf16, "keep FP8; `fp16` if it gains"),
            (lambda bf16, plain, fp16: fp16 <= bf16, "make products in fp16 (`fp16` 1) the rule"),
            (always, "products in fp16 if not yet tried; else bf16 KV below 8k tokens"),
        ),
    ),
)
