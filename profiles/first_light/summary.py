"""The summary of a first-light run: results and what to do next, in at most 40 lines."""

from collections import Counter
from collections.abc import Iterator, Sequence

from profiles.first_light.decision_table import decisions
from profiles.runs.task import NOT_STARTED, Row

LINES = 40
STEPS = ("decode_step", "engine_step", "vision")


def summary(
    rows: Sequence[Row], known: Sequence[Row], origin: Row, seconds: float, num_skipped: int
) -> str:
    """Counts by section, failures and the most important times of the run's `rows`, and the
    decisions from all rows `known` of this device and commit."""
    where = f"{origin['device']}, commit {origin['commit']}"
    head = [f"first light on {where}: {seconds:.0f} s, {num_skipped} cases already had good rows"]
    head += [*_counts(rows), "what to do next on a GPU:"]
    head += [f"  {line}" for line in decisions(known)]
    steps = [*_steps(rows)]
    failed = _truncated(_failures(rows), LINES - len(head) - len(steps))
    worst = _truncated([*_worst(rows)], LINES - len(head) - len(steps) - len(failed))
    return "\n".join([*head, *failed, *steps, *worst])


def _truncated(lines: list[str], max_lines: int) -> list[str]:
    if len(lines) <= max_lines:
        return lines
    more = f"... and {len(lines) - max_lines + 1} more: rows.jsonl"
    return [*lines[: max_lines - 1], more][: max(max_lines, 0)]


def _counts(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each section with failures or skips, and one for all others."""
    all_ok = []
    for section in dict.fromkeys(row["section"] for row in rows):
        section_rows = [row for row in rows if row["section"] == section]
        states = Counter(_state(row) for row in section_rows)
        worker_s = sum(row.get("job", {}).get("seconds", 0) for row in section_rows)
        counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
        text = f"{section}: {counts}; {worker_s:.0f} s of workers"
        if states.keys() == {"ok"}:
            all_ok.append(f"{section} {len(section_rows)} ({worker_s:.0f} s)")
        else:
            yield f"  {text}"
    if all_ok:
        yield f"  all ok: {', '.join(all_ok)}"


def _state(row: Row) -> str:
    if not row["failure"]:
        return "skipped" if row.get("skipped") else "ok"
    return "not started" if row["failure"].startswith(NOT_STARTED) else "FAILED"


def _failures(rows: Sequence[Row]) -> list[str]:
    """A line per op, form and kind of failure, with the number of cases."""
    by_kind: dict[tuple, list[Row]] = {}
    for row in rows:
        if _state(row) == "FAILED":
            name = row["case"] if row["op"] == "test" else row["op"]
            kind = row["failure"].partition(":")[0][:40]
            by_kind.setdefault((row["section"], name, row["impl"], kind), []).append(row)
    return [
        f"FAILED {section}: {name}{f', {form}' if form else ''} ({len(failed)} of them, first"
        f" {failed[0]['case']}, {failed[0]['dtype']}): {failed[0]['failure']}"[:200]
        for (section, name, form, _), failed in by_kind.items()
    ]


def _steps(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row["op"] in STEPS and row.get("median_us"):
            graphs = {True: ", CUDA graphs", False: ", no graphs"}.get(row.get("graphs", ""), "")
            yield (
                f"  {row['op']} {row['case']}, {row['impl']}: {row['median_us'] / 1e3:,.2f} ms,"
                f" {row['roofline_pct']:.0f} % of roofline{graphs}"
            )


def _worst(rows: Sequence[Row]) -> Iterator[str]:
    """For each op, our form that is furthest from the roofline."""
    ours: dict[str, Row] = {}
    for row in rows:
        timed = row["section"] == "ops" and row.get("roofline_pct") is not None
        if timed and str(row["impl"]).partition("-")[0] in ("triton", "portable"):
            worst = ours.setdefault(row["op"], row)
            if row["roofline_pct"] < worst["roofline_pct"]:
                ours[row["op"]] = row
    for row in sorted(ours.values(), key=lambda row: row["roofline_pct"]):
        yield (
            f"  slowest {row['op']}: {row['case']}, {row['impl']}: {row['median_us']:,.1f} us,"
            f" {row['roofline_pct']:.0f} % of roofline{', WRONG' if row['failure'] else ''}"
        )
