"""Tasks sent to worker processes, and their results. Imports no torch."""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from model.errors import InputError

ORIGIN = ("device", "commit", "torch", "triton", "driver", "schema")  # fields of a row
Key = tuple[str, str, str | None]  # op, case, dtype
Row = dict[str, Any]
NOT_STARTED = "not started: "
STOPPED = "stopped"
OUT_OF_TIME = f"{NOT_STARTED}out of time"


@dataclass(frozen=True)
class Task:
    """One (op, case, dtype), to be measured in some forms; `arguments` depend on the section.

    limit_s: the time after which the worker is killed
    """

    section: str
    op: str
    case: str
    dtype: str | None = None
    forms: tuple[str, ...] = ()
    limit_s: float = 60.0
    arguments: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def from_json(text: str) -> "Task":
        fields = json.loads(text)
        return Task(**fields | {"forms": tuple(fields["forms"])})

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def key(self) -> Key:
        return self.op, self.case, self.dtype

    def __str__(self) -> str:
        return f"{self.section}: {', '.join(filter(None, (*self.key, ' '.join(self.forms))))}"

    def form_by_form(self) -> list["Task"]:
        """One task per form."""
        return [replace(self, forms=(form,)) for form in self.forms]

    def without(self, form: str) -> "Task":
        return replace(self, forms=tuple(name for name in self.forms if name != form))


@dataclass(frozen=True)
class Result:
    """A task's rows, or its failure: of the task as a whole, or of one `form`.

    stderr: the end of the worker's stderr during the task
    retries: the tasks that run in its place, because not all forms may have failed
    """

    task: Task
    rows: list[Row] = field(default_factory=list)
    failure: str | None = None
    form: str | None = None
    seconds: float = 0.0
    exit_code: int | None = None
    cache_misses: int = 0
    stderr: str = ""
    retries: tuple[Task, ...] = ()

    def raise_input_error(self) -> None:
        """Raise InputError if the worker answered with one."""
        name, failure = f"{InputError.__name__}: ", self.failure or ""
        if failure.startswith(name):
            raise InputError(failure.removeprefix(name))

    def as_rows(self, origin: Row) -> list[Row]:
        """The measured rows, then a row for each form that has none because of the failure.

        The first row's "job" describes the run. origin: the fields of ORIGIN, for failure rows
        """
        task, rows = self.task, [dict(row) for row in self.rows]
        if self.failure:
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            shape = {"op": task.op, "case": task.case, "dtype": task.dtype}
            forms = (self.form,) if self.form or self.retries else task.forms or (None,)
            rows += [
                shape | {"impl": form, "failure": self.failure} | origin | {"time": now}
                for form in forms
            ]
        job: Row = {"seconds": round(self.seconds, 3), "exit_code": self.exit_code}
        job |= {"cache_misses": self.cache_misses, "stderr": self.stderr}
        rows = [{"section": task.section} | row for row in rows]
        rows[:1] = [row | {"job": job} for row in rows[:1]]
        return rows


def select(work: Sequence[Task], sections: Sequence[str], text: str) -> list[Task]:
    """The tasks of `sections` (all if empty) with `text` in their op or case.

    Raises InputError for an unknown section and if no task matches.
    """
    known = list(dict.fromkeys(task.section for task in work))
    for section in sections:
        if section not in known:
            raise InputError(f"unknown section {section!r}; choose from: {', '.join(known)}")
    selected = [task for task in work if not sections or task.section in sections]
    selected = [task for task in selected if text in f"{task.op} {task.case}"]
    if not selected:
        raise InputError(f"no case of these sections has {text!r} in its op or name")
    return selected


def rows_from(rows: Iterable[Row], origin: Row) -> list[Row]:
    """The rows from the device and commit of `origin`."""
    fields = ("device", "commit")
    return [row for row in rows if all(row.get(name) == origin[name] for name in fields)]


def outstanding(work: Sequence[Task], rows: Iterable[Row], origin: Row) -> list[Task]:
    """The tasks without good results in `rows` from this device at this clean commit.

    Tasks without any rows come first, in order; then those that failed or have rows of another
    commit, the oldest first. A task is done if the latest row of each of its forms has no failure
    (of every row, if it names no forms) and no later attempt failed as a whole.
    """
    clean = origin["commit"] != "unknown" and not origin["commit"].endswith("+dirty")
    taken: dict[tuple, str] = {}
    failures: dict[tuple, dict[str | None, str | None]] = {}
    for row in rows:
        if row.get("device") != origin["device"]:
            continue
        key = row.get("section"), row["op"], row["case"], row["dtype"]
        taken[key] = row.get("time", "")
        if clean and row["commit"] == origin["commit"]:
            by_form = failures.setdefault(key, {})
            by_form.pop(None, None)  # an earlier attempt failed as a whole; this row replaces it
            by_form[row.get("impl")] = row["failure"]

    def done(task: Task) -> bool:
        by_form = failures.get((task.section, *task.key))
        if by_form is None or any(by_form.get(form) for form in (*(task.forms or by_form), None)):
            return False
        return "all" in by_form or by_form.keys() >= {*task.forms}

    def age(task: Task) -> tuple[bool, str]:
        key = task.section, *task.key
        return key in taken, taken.get(key, "")

    return sorted((task for task in work if not done(task)), key=age)
