"""`python -m profiles tables`: README's tables of measurements, from the committed rows.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; profiles/readme_tables.py says
what it is made of. The command compares what stands there with what the rows give and exits with 1
if they differ; `--write` puts the rows' tables in place. Nothing is measured.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

from bench import rows
from model.terminal import InputError, table
from profiles.readme_tables import TABLES

README = rows.ROOT / "README.md"
MARKED = re.compile(r"^<!-- table: (.+?) -->\n(.*?)^<!-- end -->$", re.DOTALL | re.MULTILINE)
BEGIN, END = re.compile(r"^<!-- table: ", re.MULTILINE), re.compile(r"^<!-- end -->$", re.MULTILINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("--write", action="store_true", help="put the rows' tables in place")
    parser.add_argument(
        "--file", type=Path, default=README, metavar="FILE", help="default: README.md"
    )
    parser.add_argument("--json", action="store_true", help="no table; one JSON document")


def run(options: argparse.Namespace) -> int:
    """Compare or write; 1 if a table is not what the rows give, and was not written."""
    try:
        text = options.file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {options.file}: {error.strerror}") from None
    made = renewed(text, TABLES)
    states = compared(text, made)
    stale = [name for name, state in states.items() if state == "differs"]
    if stale and options.write:
        options.file.write_text(made, encoding="utf-8")
        states |= dict.fromkeys(stale, "written")
    if options.json:
        print(json.dumps({"tables": [{"name": n, "state": s} for n, s in states.items()]}))
    else:
        table(f"tables of {options.file.name}", ("table", "state"), list(states.items()))
    return int("differs" in states.values())


def renewed(text: str, tables: dict[str, Callable[[], str]]) -> str:
    """`text` with every marked table made anew.

    Raises InputError for a marker without its end, for a name that is not in `tables`, and for one
    of `tables` that stands nowhere.
    """
    names = [name for name, _ in MARKED.findall(text)]
    if not len(names) == len(BEGIN.findall(text)) == len(END.findall(text)):
        raise InputError("a `<!-- table: NAME -->` has no `<!-- end -->`, or the other way round")
    for name in names:
        if name not in tables:
            raise InputError(f"no table is called {name!r}; choose of {', '.join(tables)}")
    if missing := [name for name in tables if name not in names]:
        raise InputError(f"no marker for {', '.join(missing)}")
    made = {name: tables[name]() for name in names}
    return MARKED.sub(lambda found: _marked(found[1], made[found[1]]), text)


def compared(text: str, made: str) -> dict[str, str]:
    """Of each table, whether it "agrees" or "differs"."""
    old, new = (dict(MARKED.findall(version)) for version in (text, made))
    return {name: "agrees" if old[name] == new[name] else "differs" for name in new}


def _marked(name: str, body: str) -> str:
    return f"<!-- table: {name} -->\n{body}\n<!-- end -->"
