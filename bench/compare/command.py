"""`python -m bench compare A B`: find the cases where B is slower than A, or wrong.

A and B are commits, "." for the working tree, or two files of rows. Commits are unpacked into a
temporary folder; a worker process of each prepares a case, and the two time it alternately, A B B A
A B ..., one at a time, so that drift of the machine affects both equally. What seems to have
changed is measured again in new processes, and that measurement decides (slowdown.py). The exit
code is 1 if B is slower in a case, or wrong where A is right.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.compare import turns
from bench.compare.slowdown import Pair, judge_pairs, judge_rows
from bench.measure.devices import DTYPES, parse_device
from bench.options import SECONDS
from bench.rows import jsonl, op_tables, show
from bench.suite import OPS
from kernels.runtime.dtypes import dtype_name
from model.errors import InputError
from model.terminal import integer, progress, real

# Per stage: the number of worker processes per side, one after the other, each for `--rounds` pairs
# of runs; and the verdicts for which the next stage measures again.
STAGES = ((1, ("slower", "faster", "unclear")), (2, ("unclear",)), (4, ()))


@dataclass
class CompareResult:
    """The result of a comparison; `notes` say what could not be compared and why."""

    a: str
    b: str
    rows: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # in B, but not in A

    def with_verdict(self, verdict: str) -> list[dict]:
        return [row for row in self.rows if row["verdict"] == verdict]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("a", metavar="A", help='a commit, "." (the working tree) or a file of rows')
    parser.add_argument("b", metavar="B", nargs="?", default=".", help="the same (default: .)")
    parser.add_argument(
        "--op", nargs="+", default=(), metavar="OP", help=f"any of {', '.join(OPS)} (default: all)"
    )
    parser.add_argument("--shape", default="", metavar="TEXT", help="cases with TEXT in their name")
    parser.add_argument(
        "--impl", nargs="+", default=(), help="forms or peers to compare (default: all forms)"
    )
    names = [dtype_name(dtype) for dtype in DTYPES]
    parser.add_argument(
        "--dtype", choices=names, help="(default: float32 on a CPU, bfloat16 on a GPU)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument(
        "--threads",
        type=integer(1, 1024),
        default=1,
        metavar="N",
        help="CPU threads of each side (default: 1; with more, on a busy machine, threads mostly"
        " wait for each other)",
    )
    parser.add_argument(
        "--rounds",
        type=integer(3, 1000),  # fewer are inconclusive
        default=5,
        metavar="N",
        help="pairs of runs per case, at least 3 (default: 5)",
    )
    parser.add_argument(
        "--budget", type=SECONDS, default=0.3, metavar="S", help="seconds per run (default: 0.3)"
    )
    parser.add_argument(
        "--threshold",
        type=real(0, 1e6, exclusive=True),
        default=10.0,
        metavar="PERCENT",
        help="the smallest change to report (default: 10)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document instead of tables"
    )


def run(options: argparse.Namespace) -> int:
    """Compare A and B and print the result; return 1 if B is slower or wrong in a case."""
    files = [name.endswith(".jsonl") for name in (options.a, options.b)]
    if any(files) and not all(files):
        raise InputError("a file of rows can only be compared with another file of rows")
    result = _compare_files(options) if any(files) else _compare_commits(options)
    if not result.rows and not result.wrong:
        raise InputError("; ".join(["A and B must share at least one case", *result.notes]))
    if options.json:
        print(json.dumps(asdict(result)))
    else:
        _show(result)
    return int(bool(result.with_verdict("slower") or result.wrong))


def _compare_commits(options: argparse.Namespace) -> CompareResult:
    for op in options.op:
        if op not in OPS:
            raise InputError(f"unknown op {op!r}; choose one of {', '.join(OPS)}")
    device = parse_device(options.device)
    worker_options = turns.WorkerOptions(device.type, options.dtype, options.threads)
    result = CompareResult(options.a, options.b)
    rows: dict[turns.Key, dict] = {}
    shapes: dict[turns.Shape, list[str]] | None = None
    with ExitStack() as stack:
        roots = [stack.enter_context(turns.checkout(name)) for name in (options.a, options.b)]
        caches = Path(stack.enter_context(TemporaryDirectory(prefix="bench-caches-")))
        for num_processes, retried_verdicts in STAGES:
            pairs: dict[turns.Key, list[Pair]] = {}
            for _ in range(num_processes):
                with turns.processes(roots, caches, worker_options) as sides:
                    if shapes is None:
                        shapes = dict.fromkeys(_shared_shapes(sides, options, result), options.impl)
                    _measure(pairs, sides, shapes, options, result)
                    common = {"dtype": sides[0].dtype, "device": sides[0].device}
            rows |= {key: _row(key, pairs[key], options.threshold) | common for key in pairs}
            retried = [key for key, row in rows.items() if row["verdict"] in retried_verdicts]
            if not retried:
                break
            shapes = {}
            for op, case, form in retried:
                shapes.setdefault((op, case), []).append(form)
                del rows[op, case, form]
    result.rows = list(rows.values())
    result.notes, result.wrong = (
        list(dict.fromkeys(lines)) for lines in (result.notes, result.wrong)
    )
    return result


def _shared_shapes(
    sides: Sequence[turns.Side], options: argparse.Namespace, result: CompareResult
) -> list[turns.Shape]:
    """The selected cases that both sides have; a note lists those that only one has."""
    a, b = (
        [
            (op, case)
            for op, case in side.cases
            if (not options.op or op in options.op) and options.shape in case
        ]
        for side in sides
    )
    if not a + b:
        raise InputError(f"no case of these ops has {options.shape!r} in its name, in A or B")
    for shapes, other, name in ((a, b, result.a), (b, a, result.b)):
        result.notes += [f"only in {name}: {', '.join(s)}" for s in shapes if s not in other]
    return [shape for shape in a if shape in b]


def _measure(
    pairs: dict[turns.Key, list[Pair]],
    sides: Sequence[turns.Side],
    shapes: Mapping[turns.Shape, Sequence[str]],
    options: argparse.Namespace,
    result: CompareResult,
) -> None:
    """Measure the named forms of each case, or all forms if none is named, and add to `pairs`."""
    rounds, budget_s = options.rounds, options.budget
    with progress("compare", len(shapes) * rounds * 2) as advance:
        for shape, forms in shapes.items():
            try:
                prepared = [side.request("prepare", *shape, forms) for side in sides]
                shared = _shared_forms(shape, prepared, result)
                new_pairs = turns.take_turns(sides, shape, shared, rounds, budget_s, advance)
            except turns.WorkerError as error:
                result.notes.append(f"{', '.join(shape)}: {error}")
            except turns.WorkerDied as error:  # keep what was measured before
                text = f"{', '.join(shape)}: {error}; the remaining cases were not measured"
                result.wrong.append(text)
                break
            else:
                for key, form_pairs in new_pairs.items():
                    pairs.setdefault(key, []).extend(form_pairs)


def _shared_forms(shape: turns.Shape, prepared: Sequence[dict], result: CompareResult) -> list[str]:
    """The forms that both sides can time; the reasons for others are added to `result`."""
    a, b = prepared
    for form in dict.fromkeys([*a["unfit"], *b["unfit"]]):
        reasons = {"A": a["unfit"].get(form), "B": b["unfit"].get(form)}
        text = "; ".join(f"{side}: {reason}" for side, reason in reasons.items() if reason)
        lines = result.wrong if reasons["B"] and form in a["forms"] else result.notes
        lines.append(f"{', '.join([*shape, form])}: {text}")
    return [form for form in a["forms"] if form in b["forms"]]


def _row(key: turns.Key, pairs: Sequence[Pair], percent: float) -> dict:
    op, case, form = key
    a, b = zip(*pairs, strict=True)
    row = {"op": op, "case": case, "impl": form, "a_us": list(a), "b_us": list(b)}
    return row | asdict(judge_pairs(pairs, percent / 100))


def _compare_files(options: argparse.Namespace) -> CompareResult:
    """Compare rows that have the same op, case, form, dtype and device."""
    a, b = (_by_key(Path(name), options) for name in (options.a, options.b))
    devices = [{key[-1] for key in side} for side in (a, b)]
    if all(devices) and not devices[0] & devices[1]:
        names = [" and ".join(sorted(side)) for side in devices]
        raise InputError(f"A was measured on {names[0]}, B on {names[1]}: not comparable")
    result = CompareResult(options.a, options.b)
    for key in dict.fromkeys([*a, *b]):
        name = ", ".join(key[:-1])
        if key not in a or key not in b:
            result.notes.append(f"only in {result.a if key in a else result.b}: {name}")
            continue
        timed_a, timed_b = ([r for r in side[key] if r.get("median_us")] for side in (a, b))
        if timed_a and timed_b:
            fields = zip(("op", "case", "impl", "dtype", "device"), key, strict=True)
            medians = {
                f"{side}_us": [row["median_us"] for row in rows]
                for side, rows in (("a", timed_a), ("b", timed_b))
            }
            change = asdict(judge_rows(timed_a, timed_b, options.threshold / 100))
            result.rows.append(dict(fields) | medians | change)
        elif timed_a and (failure := b[key][-1].get("failure")):
            result.wrong.append(f"{name}: B: {failure}")
        else:
            result.notes.append(f"not timed in both A and B: {name}")
    return result


def _by_key(path: Path, options: argparse.Namespace) -> dict[tuple[str, ...], list[dict]]:
    """The selected rows of a file, by op, case, form, dtype and device."""
    if not path.exists():
        raise InputError(f"there is no file {path}")
    by_key: dict[tuple[str, ...], list[dict]] = {}
    for row in jsonl.read_measured(path):
        key = tuple(row.get(name, "") for name in ("op", "case", "impl", "dtype", "device"))
        selected = (
            all(key)
            and (not options.op or row["op"] in options.op)
            and options.shape in row["case"]
            and (not options.impl or row["impl"] in options.impl)
            and row["dtype"] == (options.dtype or row["dtype"])
        )
        if selected and ("median_us" in row or row.get("failure")):
            spread = {n: row.get(n) or row.get("median_us") for n in ("p20_us", "p80_us")}
            by_key.setdefault(key, []).append(row | spread)
    return by_key


def _show(result: CompareResult) -> None:
    """Print tables of changed rows, a line for each that could not be compared, and a summary."""
    slower, faster = (
        sorted(result.with_verdict(verdict), key=_ratio) for verdict in ("slower", "faster")
    )
    if slower:
        show.show(op_tables.SLOWER, slower[::-1])
    if faster:
        show.show(op_tables.FASTER, faster)
    for note in result.notes:
        print(f"not compared: {note}")
    for text in result.wrong:
        print(f"WRONG: {text}")
    counts = {
        "slower": len(slower),
        "faster": len(faster),
        "too noisy to tell": len(result.with_verdict("unclear")),
        "wrong": len(result.wrong),
    }
    summary = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    print(
        f"{len(result.rows)} rows of {result.a} and {result.b} compared: {summary or 'no change'}"
    )


def _ratio(row: dict) -> float:
    return row["ratio"]
