"""A piece of supervised work as data: what a worker process is asked, and what came of it.

Imports no torch.
"""

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
    """One (op, case, dtype), measured in some forms; `arguments` are those of its section.

    limit_s: after which its worker is killed
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
        """A task for each of its forms."""
        return [replace(self, forms=(form,)) for form in self.forms]

    def without(self, form: str) -> "Task":
        return replace(self, forms=tuple(name for name in self.forms if name != form))


@dataclass(frozen=True)
class Result:
    """What came of a task: rows, or a failure of the task as a whole or of one of its `form`s.

    `stderr` is the end of what was written there meanwhile; `again` are the tasks that are run in
    its place, because the failure may not be that of all forms.
    """

    task: Task
    rows: list[Row] = field(default_factory=list)
    failure: str | None = None
    form: str | None = None
    seconds: float = 0.0
    exit_code: int | None = None
    cache_misses: int = 0
    stderr: str = ""
    again: tuple[Task, ...] = ()

    def raise_mistake(self) -> None:
        """Raise InputError if that is what the worker answered."""
        name, failure = f"{InputError.__name__}: ", self.failure or ""
        if failure.startswith(name):
            raise InputError(failure.removeprefix(name))

    def as_rows(self, origin: Row) -> list[Row]:
        """What was measured, then a row for each form that the failure leaves without one.

        The first row has what is known of the run as "job". origin: where rows come from
        """
        task, rows = self.task, [dict(row) for row in self.rows]
        if self.failure:
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            shape = {"op": task.op, "case": task.case, "dtype": task.dtype}
            forms = (self.form,) if self.form or self.again else task.forms or (None,)
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

    Raises InputError for an unknown section and if nothing is left.
    """
    known = list(dict.fromkeys(task.section for task in work))
    for section in sections:
        if section not in known:
            raise InputError(f"unknown section {section!r}; choose of {', '.join(known)}")
    chosen = [task for task in work if not sections or task.section in sections]
    chosen = [task for task in chosen if text in f"{task.op} {task.case}"]
    if not chosen:
        raise InputError(f"no case of these sections has {text!r} in its op or name")
    return chosen


def of_origin(rows: Iterable[Row], origin: Row) -> list[Row]:
    """The rows that come from the device and commit of `origin`."""
    fields = ("device", "commit")
    return [row for row in rows if all(row.get(name) == origin[name] for name in fields)]


def outstanding(work: Sequence[Task], rows: Iterable[Row], origin: Row) -> list[Task]:
    """The tasks that `rows` do not have good results of, from this device at this clean commit.

    What there are no rows of at all comes first, in order; then what has rows of another commit, or
    failed, the oldest first. A task counts as done if the latest row of each of its forms has no
    failure (any row, if it names none), and no later attempt failed as a whole.
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
            of_forms = failures.setdefault(key, {})
            of_forms.pop(None, None)  # the row of an attempt that failed, made good by this one
            of_forms[row.get("impl")] = row["failure"]

    def done(task: Task) -> bool:
        found = failures.get((task.section, *task.key))
        if found is None or any(found.get(form) for form in (*(task.forms or found), None)):
            return False
        return "all" in found or found.keys() >= {*task.forms}

    def age(task: Task) -> tuple[bool, str]:
        key = task.section, *task.key
        return key in taken, taken.get(key, "")

    return sorted((task for task in work if not done(task)), key=age)
