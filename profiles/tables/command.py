"""`python -m profiles tables`: the tables of README and docs/, from the committed rows.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; each document has a module that
says what its tables are made of. The command compares what stands there with what the rows give
and exits with 1 if they differ; `--write` puts the rows' tables in place. Nothing is measured.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

from bench import rows
from model.errors import InputError
from model.terminal import table
from profiles.tables import readme as readme_tables
from profiles.tables import switches as switch_tables

Tables = dict[str, Callable[[], str]]
DOCUMENTS: dict[Path, Tables] = {
    rows.ROOT / "README.md": readme_tables.TABLES,
    rows.ROOT / "docs" / "kernel_switches.md": switch_tables.TABLES,
}
MARKED = re.compile(r"^<!-- table: (.+?) -->\n(.*?)^<!-- end -->$", re.DOTALL | re.MULTILINE)
BEGIN, END = re.compile(r"^<!-- table: ", re.MULTILINE), re.compile(r"^<!-- end -->$", re.MULTILINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("--write", action="store_true", help="put the rows' tables in place")
    names = " or ".join(file.name for file in DOCUMENTS)
    parser.add_argument("--file", type=Path, metavar="FILE", help=f"only this one: {names}")
    parser.add_argument("--json", action="store_true", help="no table; one JSON document")


def run(options: argparse.Namespace) -> int:
    """Compare or write; 1 if a table is not what the rows give, and was not written."""
    if not any(file.exists() for file in DOCUMENTS):
        raise InputError("tables are made of rows that only a checkout of the repository has")
    documents = {options.file: tables_of(options.file)} if options.file else DOCUMENTS
    found = {file: _read(file) for file in documents}
    made = {file: _made(file, found[file], tables) for file, tables in documents.items()}
    states = []
    for file, text in made.items():
        for name, state in compared(found[file], text).items():
            written = state == "differs" and options.write
            states.append((file.name, name, "written" if written else state))
        if options.write and text != found[file]:
            file.write_text(text, encoding="utf-8")
    if options.json:
        columns = ("file", "name", "state")
        print(json.dumps({"tables": [dict(zip(columns, line, strict=True)) for line in states]}))
    else:
        table("tables of measurements", ("document", "table", "state"), states)
    return int(any(state == "differs" for *_, state in states))


def tables_of(file: Path) -> Tables:
    """The tables of the document that `file` is, or is a copy of; raises InputError if none is."""
    found = [tables for document, tables in DOCUMENTS.items() if document.name == file.name]
    if not found:
        names = ", ".join(document.name for document in DOCUMENTS)
        raise InputError(f"{file}: only these have tables: {names}")
    return found[0]


def renewed(text: str, tables: Tables) -> str:
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


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None


def _made(file: Path, text: str, tables: Tables) -> str:
    try:
        return renewed(text, tables)
    except InputError as error:
        raise InputError(f"{file.name}: {error}") from None
