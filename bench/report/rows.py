"""The rows of a report: read from files and their git history, sorted by device and kind.

Files may hold rows of any version, so any field may be missing. A row of a known kind is returned
with all of FIELDS (None if missing), and its numbers are valid.
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

from bench.rows import jsonl
from bench.rows.run_tables import RUNS
from bench.rows.schema import NUMBERS, TEXTS, TIMES, invalid_field
from model.errors import InputError

OURS = ("default", "portable", "triton")  # what the names of our forms begin with
FIELDS = (*TEXTS, *TIMES, *NUMBERS)
KEY = ("op", "case", "dtype", "policy", "part")  # with the form, identifies what a row measures
WHOLE_CASE = (None, "all")  # values of `impl` in a row about all forms of a case


@dataclass(frozen=True)
class Measurements:
    """The rows of one device: the latest of each key, and those they replaced, oldest first."""

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
    """The rows of all files. Raises InputError for a missing or unreadable file, or no rows."""
    file_rows: list[dict] = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file")
        file_rows += jsonl.read(path)
    if not file_rows:
        raise InputError(f"no rows in {', '.join(map(str, paths))}")
    return file_rows


def committed(path: Path) -> list[dict]:
    """The rows of every committed version of a file, oldest first; none outside git.

    Unreadable versions are skipped: users can fix only the current file.
    """
    folder = path.resolve().parent
    commits = (_git(folder, "log", "--format=%H", "--", path.name) or b"").decode().split()
    file_rows: list[dict] = []
    with TemporaryDirectory() as scratch:
        copy = Path(scratch, "rows.jsonl")
        for commit in reversed(commits):
            copy.write_bytes(_git(folder, "show", f"{commit}:./{path.name}") or b"")
            try:
                file_rows += jsonl.read(copy)
            except InputError:
                continue
    return file_rows


def by_device(new_rows: Iterable[dict], older_rows: Iterable[dict] = ()) -> list[Measurements]:
    """The rows of each device, in the order in which devices first occur.

    Of rows with the same key the latest counts: by time or, if unknown, by order. `older_rows`
    become history only. Rows that are equal in all fields count once.
    """
    devices: dict[str, dict[str, dict]] = {}
    for row in map(_with_all_fields, new_rows):
        devices.setdefault(device_of(row), {}).setdefault(json.dumps(row, sort_keys=True), row)
    history: dict[str, list[dict]] = {}
    for row in map(_with_all_fields, older_rows):
        device_rows = devices.get(device_of(row), {})
        if json.dumps(row, sort_keys=True) not in device_rows:
            history.setdefault(device_of(row), []).append(row)
    return [
        _measurements(device, list(device_rows.values()), history.get(device, []))
        for device, device_rows in devices.items()
    ]


def _measurements(device: str, new_rows: list[dict], older_rows: list[dict]) -> Measurements:
    latest: dict[str, dict] = {}
    for row in sorted(new_rows, key=time_of):
        for form in (row.get("impl"), *WHOLE_CASE):  # a later row replaces failures and skips
            key = _key(row, form, has_result=True)
            if key in latest and not latest[key].get("median_us"):
                del latest[key]
        has_result = any(row.get(name) for name in ("median_us", "failure", "skipped"))
        latest[_key(row, row.get("impl"), has_result)] = row
    latest_ids = set(map(id, latest.values()))
    older = [*older_rows, *(row for row in new_rows if id(row) not in latest_ids)]
    return Measurements(device, list(latest.values()), sorted(older, key=time_of))


def kind_of(row: dict) -> str:
    """ "op", "roofline", "decode_part", a whole run, "no numbers" or "other"."""
    if not _is_valid(row):
        return "other"
    if row["op"] == "roofline" or row["op"] in RUNS:
        return row["op"]
    if row["op"] == "decode_part":
        return "decode_part" if row["part"] and row["median_us"] else "other"
    complete = row["case"] and row["impl"] and row["dtype"] and row["bytes"] and row["flops"]
    if complete and "tiles" not in row and (row["roofline_pct"] or not row["median_us"]):
        return "op"
    return "no numbers" if row["failure"] or row["skipped"] else "other"


def role(row: dict) -> str:
    """The role of a row's form: "eager" (the definition), "ours" or "peer"."""
    form = row["impl"] or "default"
    if form == "eager":
        return "eager"
    return "ours" if form.startswith(OURS) else "peer"


def best(candidates: Iterable[dict], form_role: str) -> dict | None:
    """The fastest row whose form has this role; None if none has a time."""
    timed = (row for row in candidates if role(row) == form_role and row["median_us"])
    return min(timed, key=lambda row: row["median_us"], default=None)


def group_by(ungrouped: Iterable[dict], *names: str) -> dict[tuple, list[dict]]:
    """Rows by the values of the fields `names`, in the given order."""
    groups: dict[tuple, list[dict]] = {}
    for row in ungrouped:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def device_of(row: dict) -> str:
    device = row.get("device")
    return device if isinstance(device, str) and device else "unknown device"


def slug(text: str) -> str:
    """A text as part of a file name or anchor."""
    return re.sub("[^a-z0-9_]+", "-", text.lower()).strip("-") or "unnamed"


def time_of(row: dict) -> float:
    """Seconds since 1970: the row's time, else its commit's, else -inf."""
    try:
        time = datetime.fromisoformat(row["time"])
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    except (KeyError, TypeError, ValueError):
        return _commit_time(str(row.get("commit")).removesuffix("+dirty"))


@cache
def _commit_time(commit: str) -> float:
    if not re.fullmatch("[0-9a-f]{7,40}", commit):
        return -math.inf
    seconds = _git(Path(__file__).parent, "show", "--no-patch", "--format=%ct", commit)
    return float(seconds) if seconds else -math.inf


def _with_all_fields(row: dict) -> dict:
    if not _is_valid(row):
        return row
    median = {name: row.get("median_us") for name in ("p20_us", "p80_us") if row.get(name) is None}
    return dict.fromkeys(FIELDS) | row | median


def _is_valid(row: dict) -> bool:
    """Whether the fields that the row has are of the right types."""
    return bool(row.get("op")) and not invalid_field(row)


def _key(row: dict, form: str | None, has_result: bool) -> str:
    """What a row measures. A row without time, failure or skip, which only checked errors, has a
    different key and replaces no time."""
    if kind_of(row) == "other":
        return json.dumps(row, sort_keys=True)
    return json.dumps([form, has_result, *(row[name] for name in KEY)])


def _git(folder: Path, *arguments: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
