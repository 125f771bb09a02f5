"""The rows behind a report: read with the history that git has of them, sorted by device and kind.

Files may hold anything that was ever measured, so any field may be missing. A row of a known kind
comes out with all of FIELDS (None where there is nothing) and with numbers that are numbers.
"""

import json
import math
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import jsonl, rows
from kernels.runtime.dispatch import IMPLS
from model.errors import InputError

WHOLE_RUNS = ("pacore", "photo", "vision", "engine_step", "packing", "replay", "scheduler_step")
TEXTS = ("op", "case", "impl", "dtype", "policy", "part", "failure", "skipped", "timer", "version")
TEXTS += ("device", "driver", "torch", "triton", "commit", "time")
NUMBERS = ("p20_us", "median_us", "p80_us", "bytes", "flops", "roofline_pct", "speedup", "max_err")
NUMBERS += ("copy_gb_s", "gemm_tflop_s")
RATES = ("tokens_per_second",)  # which only some rows have
FIELDS = (*TEXTS, *NUMBERS)
KEY = ("op", "case", "dtype", "policy", "part")  # with the form, what a row is a measurement of
WHOLE = (None, "all")  # forms of a row that speaks of a whole case


@dataclass(frozen=True)
class Measurements:
    """The rows of one device: the latest of every key, and those they replaced, oldest first."""

    device: str
    latest: list[dict]
    older: list[dict]

    def of(self, *kinds: str) -> list[dict]:
        """The latest rows of these kinds that were not skipped."""
        return [row for row in self.latest if kind_of(row) in kinds and not row.get("skipped")]

    @property
    def timed(self) -> list[dict]:
        """The latest rows of ops that have a time."""
        return [row for row in self.of("op") if row["median_us"]]


def read(paths: Sequence[Path]) -> list[dict]:
    """The rows of all files. Raises InputError for a file that is not there, and for no rows."""
    found = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file")
        try:
            found += jsonl.read(path)
        except UnicodeDecodeError:
            raise InputError(f"{path}: not a text file of rows, a JSON object a line") from None
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
    if not found:
        raise InputError(f"no rows in {', '.join(map(str, paths))}")
    return found


def committed(path: Path) -> list[dict]:
    """The rows of every version of a file that git knows, oldest first; none outside git.

    Versions that cannot be read any more are left out: only today's file is the user's to mend.
    """
    folder = path.resolve().parent
    commits = (_git(folder, "log", "--format=%H", "--", path.name) or b"").decode().split()
    found: list[dict] = []
    with TemporaryDirectory() as scratch:
        copy = Path(scratch, "rows.jsonl")
        for commit in reversed(commits):
            copy.write_bytes(_git(folder, "show", f"{commit}:./{path.name}") or b"")
            try:
                found += jsonl.read(copy)
            except (InputError, UnicodeDecodeError):
                continue
    return found


def by_device(found: Iterable[dict], before: Iterable[dict] = ()) -> list[Measurements]:
    """Rows per device, in the order in which devices come.

    Of rows with one key the latest counts, in the order given where times are not known. `before`
    are rows of older files: history only. Rows alike in all their fields count once.
    """
    devices: dict[str, dict[str, dict]] = {}
    for row in map(_complete, found):
        devices.setdefault(device_of(row), {}).setdefault(json.dumps(row, sort_keys=True), row)
    history: dict[str, list[dict]] = {}
    for row in map(_complete, before):
        of_device = devices.get(device_of(row), {})
        if json.dumps(row, sort_keys=True) not in of_device:
            history.setdefault(device_of(row), []).append(row)
    return [
        _sorted_out(device, list(of_device.values()), history.get(device, []))
        for device, of_device in devices.items()
    ]


def _sorted_out(device: str, found: list[dict], before: list[dict]) -> Measurements:
    latest: dict[str, dict] = {}
    for row in sorted(found, key=when):
        for form in (row.get("impl"), *WHOLE):  # what failed or was skipped is so no more
            key = _key(row, form, told=True)
            if key in latest and not latest[key].get("median_us"):
                del latest[key]
        told = any(row.get(name) for name in ("median_us", "failure", "skipped"))
        latest[_key(row, row.get("impl"), told)] = row
    kept = set(map(id, latest.values()))
    older = [*before, *(row for row in found if id(row) not in kept)]
    return Measurements(device, list(latest.values()), sorted(older, key=when))


def kind_of(row: dict) -> str:
    """ "op", "roofline", "decode_part", a whole run, "no numbers" or "other"."""
    if not _sound(row):
        return "other"
    if row["op"] in (*WHOLE_RUNS, "roofline"):
        return row["op"]
    if row["op"] == "decode_part":
        return "decode_part" if row["part"] and row["median_us"] else "other"
    complete = row["case"] and row["impl"] and row["dtype"] and row["bytes"] and row["flops"]
    if complete and "tiles" not in row and (row["roofline_pct"] or not row["median_us"]):
        return "op"
    return "no numbers" if row["failure"] or row["skipped"] else "other"


def role(row: dict) -> str:
    """Whose form a row measured: "eager" (the definition), "ours" or "peer"."""
    form = row["impl"] or "default"
    if form == "eager":
        return "eager"
    return "ours" if form.startswith((*IMPLS, "default")) else "peer"


def best(found: Iterable[dict], whose: str) -> dict | None:
    """The fastest of these rows in a role."""
    timed = (row for row in found if role(row) == whose and row["median_us"])
    return min(timed, key=lambda row: row["median_us"], default=None)


def grouped(found: Iterable[dict], *names: str) -> dict[tuple, list[dict]]:
    """Rows by the values of these fields, in the order in which they come."""
    groups: dict[tuple, list[dict]] = {}
    for row in found:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def device_of(row: dict) -> str:
    device = row.get("device")
    return device if isinstance(device, str) and device else "unknown device"


def name_of(text: str) -> str:
    """A text as a part of a file's name and of an anchor."""
    return re.sub("[^a-z0-9_]+", "-", text.lower()).strip("-") or "unnamed"


def when(row: dict) -> float:
    """Seconds since 1970: the row's time, else its commit's, else before all others."""
    try:
        time = datetime.fromisoformat(row["time"])
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    except (KeyError, TypeError, ValueError):
        return _commit_time(str(row.get("commit")).removesuffix("+dirty"))


@cache
def _commit_time(commit: str) -> float:
    if not re.fullmatch("[0-9a-f]{7,40}", commit):
        return -math.inf
    found = rows.git("show", "--no-patch", "--format=%ct", commit)
    return float(found) if found else -math.inf


def _complete(row: dict) -> dict:
    if not _sound(row):
        return row
    median = {name: row.get("median_us") for name in ("p20_us", "p80_us") if row.get(name) is None}
    return dict.fromkeys(FIELDS) | row | median


def _sound(row: dict) -> bool:
    """Whether the fields that are there are of the right types."""
    texts = all(isinstance(row.get(name), str | None) for name in TEXTS)
    numbers = [row[name] for name in (*NUMBERS, *RATES) if row.get(name) is not None]
    return (
        texts
        and bool(row.get("op"))
        and all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers)
        and all(math.isfinite(x) and x >= 0 for x in numbers)
        and all(row[name] > 0 for name in NUMBERS[:3] if row.get(name) is not None)
    )


def _key(row: dict, form: str | None, told: bool) -> str:
    """What a row is a measurement of. One that checks numbers and has nothing to tell replaces no
    time."""
    if kind_of(row) == "other":
        return json.dumps(row, sort_keys=True)
    return json.dumps([form, told, *(row[name] for name in KEY)])


def _git(folder: Path, *arguments: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
