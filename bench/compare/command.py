"""Is B slower than A? `python -m bench compare A B`.

A and B are commits, "." for the working tree, or two files of rows. Commits are unpacked into a
temporary folder; a process of each prepares a case and they take turns at timing it, A B B A A B
..., one at a time, so that drift of the machine meets both alike. What looks changed is measured
again in new processes, and that measurement decides: slowdown.py says how. Exit code 1 if B
is slower somewhere, or wrong where A is right.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from bench import jsonl
from bench.cases import OPS
from bench.compare import turns
from bench.compare.slowdown import Pair, judged, unpaired
from bench.ops import DTYPES, parse_device
from kernels.runtime.dtypes import dtype_name
from model.errors import InputError
from model.terminal import progress, table

# How many processes of a side, one after the other, each for `--rounds` pairs of runs; and the
# verdicts that leave the last word to the next stage.
STAGES = ((1, ("slower", "faster", "unclear")), (2, ("unclear",)), (4, ()))


@dataclass
class Found:
    """What a comparison came to; `notes` say what could not be compared and why."""

    a: str
    b: str
    rows: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # in B, where A is right

    def of(self, verdict: str) -> list[dict]:
        return [row for row in self.rows if row["verdict"] == verdict]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("a", metavar="A", help='a commit, "." (the working tree) or a file of rows')
    parser.add_argument("b", metavar="B", nargs="?", default=".", help="likewise (default: .)")
    parser.add_argument("--op", nargs="+", default=(), metavar="OP", help=f"of {', '.join(OPS)}")
    parser.add_argument("--shape", default="", metavar="TEXT", help="cases with TEXT in their name")
    parser.add_argument(
        "--impl", nargs="+", default=(), help="these forms or peers (default: forms)"
    )
    names = [dtype_name(dtype) for dtype in DTYPES]
    parser.add_argument("--dtype", choices=names, help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="CPU threads of each side (default: 1; with more, where others are at work too, times"
        " are those of waiting for threads that are not running)",
    )
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="pairs of runs per case (default: 5)"
    )
    parser.add_argument(
        "--budget", type=float, default=0.3, metavar="S", help="seconds per run (default: 0.3)"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=10.0,
        metavar="PERCENT",
        help="the smallest change that counts (default: 10)",
    )
    parser.add_argument("--json", action="store_true", help="no tables; one JSON document")


def run(options: argparse.Namespace) -> int:
    """Compare, show; 1 if B is slower or wrong somewhere."""
    if options.rounds < 3:
        raise InputError(f"--rounds must be 3 or more, not {options.rounds}: fewer settle nothing")
    if min(options.budget, options.threshold, options.threads) <= 0:
        raise InputError("--budget, --threshold and --threads must be positive")
    files = [name.endswith(".jsonl") for name in (options.a, options.b)]
    if any(files) and not all(files):
        raise InputError("a file of rows can only be compared with another file of rows")
    found = _of_files(options) if any(files) else _of_commits(options)
    if not found.rows and not found.wrong:
        raise InputError("; ".join(["A and B have nothing in common", *found.notes]))
    if options.json:
        print(json.dumps(asdict(found)))
    else:
        _show(found)
    return int(bool(found.of("slower") or found.wrong))


def _of_commits(options: argparse.Namespace) -> Found:
    for op in options.op:
        if op not in OPS:
            raise InputError(f"unknown op {op!r}; choose of {', '.join(OPS)}")
    device = parse_device(options.device)
    settings = turns.Settings(device.type, options.dtype, options.threads)
    found, made, shapes = Found(options.a, options.b), {}, None
    with ExitStack() as stack:
        roots = [stack.enter_context(turns.checkout(name)) for name in (options.a, options.b)]
        caches = Path(stack.enter_context(TemporaryDirectory(prefix="bench-caches-")))
        for times, doubted in STAGES:
            pairs: dict[turns.Key, list[Pair]] = {}
            for _ in range(times):
                with turns.processes(roots, caches, settings) as sides:
                    if shapes is None:
                        shapes = dict.fromkeys(_shared_shapes(sides, options, found), options.impl)
                    _measure(pairs, sides, shapes, options, found)
                    common = {"dtype": sides[0].dtype, "device": sides[0].device}
            made |= {key: _row(key, pairs[key], options.threshold) | common for key in pairs}
            doubtful = [key for key, row in made.items() if row["verdict"] in doubted]
            if not doubtful:
                break
            shapes = {}
            for op, case, form in doubtful:
                shapes.setdefault((op, case), []).append(form)
                del made[op, case, form]
    found.rows = list(made.values())
    found.notes, found.wrong = (list(dict.fromkeys(told)) for told in (found.notes, found.wrong))
    return found


def _shared_shapes(
    sides: Sequence[turns.Side], options: argparse.Namespace, found: Found
) -> list[turns.Shape]:
    """The chosen cases that both sides have; those of one side are noted."""
    a, b = (
        [
            (op, case)
            for op, case in side.cases
            if (not options.op or op in options.op) and options.shape in case
        ]
        for side in sides
    )
    if not a + b:
        raise InputError(f"neither side has a case of these ops with {options.shape!r} in its name")
    for mine, other, name in ((a, b, found.a), (b, a, found.b)):
        found.notes += [f"only in {name}: {', '.join(s)}" for s in mine if s not in other]
    return [shape for shape in a if shape in b]


def _measure(
    pairs: dict[turns.Key, list[Pair]],
    sides: Sequence[turns.Side],
    shapes: dict[turns.Shape, Sequence[str]],
    options: argparse.Namespace,
    found: Found,
) -> None:
    """Add to the pairs of runs of the cases' forms: of all that there are where none is named."""
    rounds, budget_s = options.rounds, options.budget
    with progress("compare", len(shapes) * rounds * 2) as advance:
        for shape, forms in shapes.items():
            try:
                ready = [side.ask("prepare", *shape, forms) for side in sides]
                shared = _shared_forms(shape, ready, found)
                new = turns.take_turns(sides, shape, shared, rounds, budget_s, advance)
            except turns.Refused as error:
                found.notes.append(f"{', '.join(shape)}: {error}")
            except turns.Died as error:  # what was measured is still told
                found.wrong.append(f"{', '.join(shape)}: {error}; the rest was not measured")
                break
            else:
                for key, of_form in new.items():
                    pairs.setdefault(key, []).extend(of_form)


def _shared_forms(shape: turns.Shape, ready: Sequence[dict], found: Found) -> list[str]:
    """The forms that both sides can time; what one side alone cannot is told."""
    a, b = ready
    for form in dict.fromkeys([*a["unfit"], *b["unfit"]]):
        reasons = {"A": a["unfit"].get(form), "B": b["unfit"].get(form)}
        text = "; ".join(f"{side}: {reason}" for side, reason in reasons.items() if reason)
        told = found.wrong if reasons["B"] and form in a["forms"] else found.notes
        told.append(f"{', '.join([*shape, form])}: {text}")
    return [form for form in a["forms"] if form in b["forms"]]


def _row(key: turns.Key, pairs: Sequence[Pair], percent: float) -> dict:
    op, case, form = key
    a, b = zip(*pairs, strict=True)
    row = {"op": op, "case": case, "impl": form, "a_us": list(a), "b_us": list(b)}
    return row | asdict(judged(pairs, percent / 100))


def _of_files(options: argparse.Namespace) -> Found:
    """Rows of equal op, case, form, dtype and device."""
    a, b = (_by_key(Path(name), options) for name in (options.a, options.b))
    devices = [{key[-1] for key in side} for side in (a, b)]
    if all(devices) and not devices[0] & devices[1]:
        names = [" and ".join(sorted(of_side)) for of_side in devices]
        raise InputError(f"A was measured on {names[0]}, B on {names[1]}: times do not compare")
    found = Found(options.a, options.b)
    for key in dict.fromkeys([*a, *b]):
        name = ", ".join(key[:-1])
        if key not in a or key not in b:
            found.notes.append(f"only in {found.a if key in a else found.b}: {name}")
            continue
        timed = [[row for row in side[key] if row.get("median_us")] for side in (a, b)]
        if all(timed):
            fields = zip(("op", "case", "impl", "dtype", "device"), key, strict=True)
            medians = {
                f"{which}_us": [row["median_us"] for row in of_side]
                for which, of_side in zip("ab", timed, strict=True)
            }
            judgement = asdict(unpaired(*timed, options.threshold / 100))
            found.rows.append(dict(fields) | medians | judgement)
        elif timed[0] and (failure := b[key][-1].get("failure")):
            found.wrong.append(f"{name}: B: {failure}")
        else:
            found.notes.append(f"no times on both sides: {name}")
    return found


def _by_key(path: Path, options: argparse.Namespace) -> dict[tuple[str, ...], list[dict]]:
    """The chosen rows of a file under op, case, form, dtype and device."""
    if not path.exists():
        raise InputError(f"there is no file {path}")
    found: dict[tuple[str, ...], list[dict]] = {}
    for row in jsonl.read(path):
        key = tuple(row.get(name) for name in ("op", "case", "impl", "dtype", "device"))
        chosen = (
            all(key)
            and (not options.op or row["op"] in options.op)
            and options.shape in row["case"]
            and (not options.impl or row["impl"] in options.impl)
            and row["dtype"] == (options.dtype or row["dtype"])
        )
        if chosen and ("median_us" in row or row.get("failure")):
            found.setdefault(key, []).append(row)
    return found


def _show(found: Found) -> None:
    """What changed as tables, what could not be compared in lines, and a last line that sums up."""
    slower, faster = (sorted(found.of(which), key=_ratio) for which in ("slower", "faster"))
    if slower:
        _table("slower in B", reversed(slower))
    if faster:
        _table("faster in B", faster)
    for note in found.notes:
        print(f"not compared: {note}")
    for text in found.wrong:
        print(f"WRONG: {text}")
    counts = {
        "slower": len(slower),
        "faster": len(faster),
        "too noisy to tell": len(found.of("unclear")),
        "wrong": len(found.wrong),
    }
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    print(f"{len(found.rows)} rows of {found.a} and {found.b} compared: {told or 'no change'}")


def _ratio(row: dict) -> float:
    return row["ratio"]


def _table(title: str, changed: Iterable[dict]) -> None:
    header = ("op", "case", "impl", "dtype", " A us", " B us", " B / A", " margin", " pairs")
    lines = [
        [
            *(row[name] for name in ("op", "case", "impl", "dtype")),
            *(f"{median(row[name]):,.1f}" for name in ("a_us", "b_us")),
            f"{row['ratio']:.2f}",
            f"{row['margin']:.2f}",
            f"{row['agreeing']} of {row['pairs']}" if row["agreeing"] is not None else "",
        ]
        for row in changed
    ]
    table(title, header, lines)
