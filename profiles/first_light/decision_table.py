"""The decision table: what the first measurements on a GPU say to do next. Imports no torch.

One entry per question, the most important first. The reasons for the limits:

- If numbers are wrong or a kernel hangs, its times mean nothing.
- Decode attention takes t = a + bytes / w. w is the rate of streaming KV; below 85 % of the copy
  bandwidth the loop over KV is at fault. If only 64 rollouts are slow, the cause is their many
  tiles of 16 rows, which share launches and registers with the large tiles; otherwise it is the
  loop.
- a is the cost of a call outside that loop: finding the work, the first page, the merge. About 3 us
  are expected, and 16 rollouts read for only about 14 us, too short to hide them. Tuning
  block sizes cannot lower a; records of pieces and an earlier start can.
- `ahead` takes the load of the page number out of the pipeline of K and V loads. If it gains less
  than 3 % on every case, CTAs do not wait for the pipeline, and the ideas that build on it fail
  too.
- A step has some 250 launches: above 2.5 us each they cost as much as attention.
- Linear layers are 85 % of a step. The library's products may leave 12 % of the copy bandwidth
  unused; our own products that stream the weights should reach 90 to 93 %.
- Vision attention, without the launch that rotates Q and K (its traffic at copy bandwidth), is
  bound by tensor cores, exponentials and instruction issue alike: 430 to 470 TFLOP/s were
  predicted. Below 400 there is a cause that tuning will not find; above 480 only the rotation
  remains.
- FP8 halves the bytes but converts every element. Conversion to bf16 is expensive, to fp16 cheap.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from bench.rows.shapes import shape_of
from profiles.first_light.line_fit import Line, fit
from profiles.runs.task import NOT_STARTED, Row

MEASURING = ("numerics", "tests", "pairs", "ops", "decode", "engine", "vision")
OURS = ("triton", "portable", "default", "None")  # prefixes of the forms whose failures count
BATCHES = (16, 64)
FP8_CASE = "B16 P2048 S512"
Reading = tuple[tuple[float, ...], str]  # values for the rules, and text for people
Rule = tuple[Callable[..., bool], str]


def always(*_: float) -> bool:
    return True


@dataclass(frozen=True)
class Decision:
    """A question: `read` answers it from rows (None: not measured), and the first rule that holds
    says what to do."""

    question: str
    read: Callable[[Sequence[Row]], Reading | None]
    rules: tuple[Rule, ...]

    def line(self, rows: Sequence[Row]) -> str:
        """For example "launch in a graph: 1.8 us -> launches are cheap: attention comes first"."""
        reading = self.read(rows)
        if reading is None:
            return f"{self.question}: not measured"
        values, text = reading
        action = next(action for holds, action in self.rules if holds(*values))
        return f"{self.question}: {text} -> {action}"


def decisions(rows: Iterable[Row]) -> list[str]:
    """One line per entry of the table, from the rows of one device and commit."""
    latest_rows = latest(rows)
    return [decision.line(latest_rows) for decision in TABLE]


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each measurement; a task that failed as a whole has one until a form does."""
    kept: dict[tuple, Row] = {}
    for row in rows:
        task = tuple(row.get(name) for name in ("section", "op", "case", "dtype"))
        kept.pop((*task, None), None)
        kept[*task, row.get("impl")] = row
    return list(kept.values())


def attention_lines(rows: Sequence[Row], pair: str) -> dict[int, Line]:
    """By number of rollouts, the line through decode attention's times in one form of its pairs."""
    lines = {}
    for batch in BATCHES:
        batch_rows = [row for row in _pair_rows(rows, pair) if _decodes(row, batch)]
        if line := fit([(row["bytes"], row["median_us"]) for row in batch_rows]):
            lines[batch] = line
    return lines


def gains(rows: Sequence[Row], switch: str, old: str = "0", new: str = "1") -> dict[str, float]:
    """By case of attention, the percent of its time that a switch saves."""
    before = {row["case"]: row["median_us"] for row in _pair_rows(rows, f"{switch} {old}")}
    after = {row["case"]: row["median_us"] for row in _pair_rows(rows, f"{switch} {new}")}
    return {case: 100 * (1 - after[case] / us) for case, us in before.items() if case in after}


def copy_rate(rows: Sequence[Row]) -> float:
    """Copy bandwidth in GB/s: the mean over the processes that timed something."""
    return fmean(row["copy_gb_s"] for row in rows)


def _wrong(rows: Sequence[Row]) -> Reading | None:
    measured = [row for row in rows if row.get("section") in MEASURING]
    if not any(row["section"] == "numerics" for row in measured):
        return None
    failed = [row for row in measured if _failed(row)]
    names = ", ".join(dict.fromkeys(row["op"] for row in failed))
    return (len(failed),), f"{len(failed)} ({names})" if failed else "none"


def _rates(rows: Sequence[Row]) -> Reading | None:
    lines = _lines(rows)
    if lines is None:
        return None
    copy = copy_rate(good(rows, "pairs"))
    percent = [100 * line.gb_s / copy for line in lines]
    shown = zip(BATCHES, lines, percent, strict=True)
    text = ", ".join(f"B{batch} {line.gb_s:,.0f} GB/s ({pct:.0f} %)" for batch, line, pct in shown)
    return tuple(percent), text


def _fixed_costs(rows: Sequence[Row]) -> Reading | None:
    lines = _lines(rows)
    if lines is None:
        return None
    shown = zip(BATCHES, lines, strict=True)
    text = ", ".join(f"B{batch} {line.start_us:.1f} us" for batch, line in shown)
    return (max(line.start_us for line in lines),), text


def _ahead(rows: Sequence[Row]) -> Reading | None:
    percent = gains(rows, "ahead").values()
    if not percent:
        return None
    return (max(percent),), f"{min(percent):+.1f} to {max(percent):+.1f} %, cases: {len(percent)}"


def _launch(rows: Sequence[Row]) -> Reading | None:
    times = [row["median_us"] for row in good(rows, "launches")]
    return ((times[-1],), f"{times[-1]:.2f} us") if times else None


def _linears(rows: Sequence[Row]) -> Reading | None:
    """The rules use a step with 16 rows; the text has the others too."""
    by_rows: dict[int, list[Row]] = {}
    for row in good(rows, "linears"):
        by_rows.setdefault(row["rows"], []).append(row)
    shares = {count: _share(step) for count, step in sorted(by_rows.items()) if len(step) == 5}
    if 16 not in shares:
        return None
    worst = min(by_rows[16], key=lambda row: row["copy_pct"])
    sums = ", ".join(f"{count} rows {share:.0f} %" for count, share in shares.items())
    return (shares[16],), f"{sums} ({worst['case']} {worst['copy_pct']:.0f} %)"


def _share(step: Sequence[Row]) -> float:
    """Percent of the copy bandwidth over all products of a step."""
    num_bytes, us = (
        sum(row["per_step"] * row[name] for row in step) for name in ("bytes", "median_us")
    )
    return 100 * num_bytes / us / 1e3 / copy_rate(step)


def _vision(rows: Sequence[Row]) -> Reading | None:
    vision = [row for row in _pair_rows(rows, "rule") if row["op"] == "vision_attention"]
    if not vision:
        return None
    row = vision[-1]
    # The rotation reads and writes Q and K, as many elements as the op reads and writes; only K if
    # the attention kernel rotates Q.
    moved = row["bytes"] / (2 if (row["tiles"] or {}).get("turn_q") else 1)
    us = row["median_us"] - moved / row["copy_gb_s"] / 1e3
    if us <= 0:
        return None
    rate = row["flops"] / us / 1e6
    return (rate,), f"{rate:,.0f} TFLOP/s without its rotation"


def _fp8(rows: Sequence[Row]) -> Reading | None:
    def us(pair: str, case: str) -> float | None:
        return next(
            (row["median_us"] for row in _pair_rows(rows, pair) if row["case"] == case), None
        )

    bf16, fp8_case = us("rule", FP8_CASE), f"{FP8_CASE} fp8"
    plain, fp16 = us("rule", fp8_case) or us("fp16 0", fp8_case), us("fp16 1", fp8_case)
    if bf16 is None or plain is None:
        return None
    in_fp16 = f", {fp16:.1f} us with products in fp16" if fp16 else ""
    return (bf16, plain, fp16 or math.inf), f"{plain:.1f} us{in_fp16}; bf16 {bf16:.1f} us"


def _lines(rows: Sequence[Row]) -> list[Line] | None:
    """The lines of the form with `ahead`; of the rule if that has none."""
    for pair in ("ahead 1", "rule"):
        lines = attention_lines(rows, pair)
        if len(lines) == len(BATCHES):
            return [lines[batch] for batch in BATCHES]
    return None


def _pair_rows(rows: Sequence[Row], pair: str) -> list[Row]:
    return [row for row in good(rows, "pairs") if row.get("pair") == pair]


def good(rows: Sequence[Row], section: str) -> list[Row]:
    """A section's rows that have a time and no failure."""
    section_rows = [row for row in rows if row.get("section") == section]
    return [row for row in section_rows if not row["failure"] and row.get("median_us")]


def _decodes(row: Row, batch: int) -> bool:
    """Whether it is attention of `batch` rollouts, with the model's heads and KV in 16 bits."""
    shape = shape_of(row)
    plain = not (shape.get("fp8") or shape.get("window")) and shape.get("heads") == 32
    return row["op"] == "prefix_attention" and plain and shape.get("batch") == batch


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
                "run the smallest such case under compute-sanitizer, then repeat this; no tuning",
            ),
        ),
    ),
    Decision(
        "rate of decode attention, share of copy bandwidth",
        _rates,
        (
            (lambda b16, b64: min(b16, b64) >= 85, "fine"),
            (
                lambda b16, b64: b16 >= 85,
                "launch the tiles of 16 rows separately (`split`)",
            ),
            (always, "profile the loop of 16-row tiles with ncu: what does it wait for?"),
        ),
    ),
    Decision(
        "fixed cost of decode attention",
        _fixed_costs,
        (
            (lambda us: us <= 6, "fine: tune kernel configs"),
            (always, "once the rate is fine: `pieces` and `pdl` where they gain, before tuning"),
        ),
    ),
    Decision(
        "gain from loading the page number early (`ahead`)",
        _ahead,
        (
            (
                lambda gain: gain < 3,
                "CTAs do not wait for this: look at the stalls at DEPBAR (ncu) first",
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
        "linear layers of a step, share of copy bandwidth",
        _linears,
        (
            (
                lambda pct: pct < 88,
                "write a product that streams weights: it gains more than anything else",
            ),
            (always, "leave them to the library"),
        ),
    ),
    Decision(
        "vision attention",
        _vision,
        (
            (lambda rate: rate < 400, "profile it with ncu"),
            (lambda rate: rate <= 480, "tune its kernel config"),
            (always, "only the rotation of Q in the kernel (`turn_q`) is left to try"),
        ),
    ),
    Decision(
        "attention over FP8 KV",
        _fp8,
        (
            (lambda bf16, plain, fp16: plain <= bf16, "keep FP8; `fp16` if it gains"),
            (lambda bf16, plain, fp16: fp16 <= bf16, "make products in fp16 (`fp16` 1) the rule"),
            (always, "try products in fp16 if not yet tried; otherwise bf16 KV below 8k tokens"),
        ),
    ),
)
