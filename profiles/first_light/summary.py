"""What a first-light run found, and what to do next, in at most 40 lines."""

from collections import Counter
from collections.abc import Iterator, Sequence

from profiles.first_light.decision_table import decisions
from profiles.runs.task import NOT_STARTED, Row

LINES = 40
STEPS = ("decode_step", "engine_step", "vision")


def summary(
    rows: Sequence[Row], known: Sequence[Row], origin: Row, seconds: float, already: int
) -> str:
    """Counts by section of the run's `rows`, what failed, and the times that matter most; of all
    rows `known` of this device and commit, what they say to do next."""
    where = f"{origin['device']}, commit {origin['commit']}"
    head = [f"first light on {where}: {seconds:.0f} s, {already} cases already had good rows"]
    head += [*_counts(rows), "what to do next on a GPU:"]
    head += [f"  {line}" for line in decisions(known)]
    steps = [*_steps(rows)]
    failed = _shortened(_failures(rows), LINES - len(head) - len(steps))
    worst = _shortened([*_worst(rows)], LINES - len(head) - len(steps) - len(failed))
    return "\n".join([*head, *failed, *steps, *worst])


def _shortened(lines: list[str], room: int) -> list[str]:
    if len(lines) <= room:
        return lines
    return [*lines[: room - 1], f"... and {len(lines) - room + 1} more: rows.jsonl"][: max(room, 0)]


def _counts(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each section that has something to tell, one for all others."""
    fine = []
    for section in dict.fromkeys(row["section"] for row in rows):
        of_section = [row for row in rows if row["section"] == section]
        states = Counter(_state(row) for row in of_section)
        taken = sum(row.get("job", {}).get("seconds", 0) for row in of_section)
        counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
        text = f"{section}: {counts}; {taken:.0f} s of workers"
        if states.keys() == {"ok"}:
            fine.append(f"{section} {len(of_section)} ({taken:.0f} s)")
        else:
            yield f"  {text}"
    if fine:
        yield f"  all ok: {', '.join(fine)}"


def _state(row: Row) -> str:
    if not row["failure"]:
        return "skipped" if row.get("skipped") else "ok"
    return "not started" if row["failure"].startswith(NOT_STARTED) else "FAILED"


def _failures(rows: Sequence[Row]) -> list[str]:
    """A line for each op, form and kind of failure, with the number of cases."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        if _state(row) == "FAILED":
            name = row["case"] if row["op"] == "test" else row["op"]
            kind = row["failure"].partition(":")[0][:40]
            found.setdefault((row["section"], name, row["impl"], kind), []).append(row)
    return [
        f"FAILED {section}: {name}{f', {form}' if form else ''}"
        f" ({len(of)} of them, first {of[0]['case']}, {of[0]['dtype']}): {of[0]['failure']}"[:200]
        for (section, name, form, _), of in found.items()
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
    """Of each op the form of ours that is furthest from the roofline."""
    ours: dict[str, Row] = {}
    for row in rows:
        timed = row["section"] == "ops" and row.get("roofline_pct") is not None
        if timed and str(row["impl"]).partition("-")[0] in ("triton", "portable"):
            best = ours.setdefault(row["op"], row)
            if row["roofline_pct"] < best["roofline_pct"]:
                ours[row["op"]] = row
    for row in sorted(ours.values(), key=lambda row: row["roofline_pct"]):
        yield (
            f"  slowest {row['op']}: {row['case']}, {row['impl']}: {row['median_us']:,.1f} us,"
            f" {row['roofline_pct']:.0f} % of roofline{', WRONG' if row['failure'] else ''}"
        )
