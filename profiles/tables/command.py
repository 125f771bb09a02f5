"""`python -m profiles tables`: the generated tables of README and docs/, and README's plot.

A page holds a table between `<!-- table: NAME -->` and `<!-- end -->`; any page may hold any table.
The command compares tables and plot with the committed rows and exits with 1 if one is stale;
`--write` renews them. Nothing is measured.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.measure.origin import ROOT
from model.errors import InputError
from model.terminal import table
from model.text.files import read_text
from profiles.tables import decode_plot, results, switches

PAGES = tuple(ROOT / name for name in ("README.md", "docs/results.md", "docs/kernel_switches.md"))
PLOT = ROOT / "docs" / "decode.svg"
GENERATORS: dict[str, Callable[[], str]] = results.TABLES | switches.TABLES
MARKED = re.compile(r"^<!-- table: (.+?) -->\n(.*?)^<!-- end -->$", re.DOTALL | re.MULTILINE)
BEGIN, END = re.compile(r"^<!-- table: ", re.MULTILINE), re.compile(r"^<!-- end -->$", re.MULTILINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--write", action="store_true", help="renew what is stale")
    parser.add_argument(
        "--file", type=Path, metavar="FILE", help="only the tables of this page; any Markdown file"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document, no table")


def run(options: argparse.Namespace) -> int:
    """Compare or write; return 1 if a table or the plot is stale and was not written."""
    if not any(page.exists() for page in PAGES):
        raise InputError(
            "run this in a checkout: the rows that tables come from are only in a checkout of the"
            " repository"
        )
    pages = [options.file] if options.file else PAGES
    texts = {page: _read(page) for page in pages}
    renewed = {page: _renew_page(page, text) for page, text in texts.items()}
    states = [
        (page.name, name, state)
        for page in pages
        for name, state in compare(texts[page], renewed[page])
    ]
    if not options.file:
        require_all_used(texts.values())
        states.append((PLOT.name, "plot", "agrees" if decode_plot.is_current(PLOT) else "differs"))
    if options.write:
        for page in pages:
            if renewed[page] != texts[page]:
                page.write_text(renewed[page], encoding="utf-8")
        if (PLOT.name, "plot", "differs") in states:
            decode_plot.draw(PLOT)
        states = [
            (file, name, "written" if state == "differs" else state) for file, name, state in states
        ]
    if options.json:
        columns = ("file", "name", "state")
        print(json.dumps({"tables": [dict(zip(columns, line, strict=True)) for line in states]}))
    else:
        table("tables of measurements", ("page", "table", "state"), states)
    return int(any(state == "differs" for *_, state in states))


def renew(text: str) -> str:
    """`text` with every table regenerated.

    Raises InputError if there is no table, for a marker without its end and for unknown names.
    """
    names = table_names(text)
    if not len(names) == len(BEGIN.findall(text)) == len(END.findall(text)):
        raise InputError("a `<!-- table: NAME -->` has no `<!-- end -->`, or the other way round")
    if not names:
        raise InputError("the page has no table: no `<!-- table: NAME -->`")
    if unknown := [name for name in names if name not in GENERATORS]:
        raise InputError(
            f"no table is called {', '.join(map(repr, unknown))}; choose from: "
            + ", ".join(GENERATORS)
        )
    bodies = {name: GENERATORS[name]() for name in names}
    return MARKED.sub(
        lambda match: f"<!-- table: {match[1]} -->\n{bodies[match[1]]}\n<!-- end -->", text
    )


def compare(old: str, new: str) -> list[tuple[str, str]]:
    """Each table's name, and whether it "agrees" or "differs" between two versions of a page."""
    return [
        (name, "agrees" if old_body == new_body else "differs")
        for (name, old_body), (_, new_body) in zip(
            MARKED.findall(old), MARKED.findall(new), strict=True
        )
    ]


def require_all_used(texts: Iterable[str]) -> None:
    """Raise InputError if a generated table is on no page."""
    used = {name for text in texts for name in table_names(text)}
    if unused := [name for name in GENERATORS if name not in used]:
        raise InputError(
            f"no page has the table {', '.join(map(repr, unused))}; put a marker on one"
        )


def table_names(text: str) -> list[str]:
    """The names of the tables of a page, in its order."""
    return [name for name, _ in MARKED.findall(text)]


def _read(page: Path) -> str:
    text = read_text(page)
    if text is None:
        raise InputError(f"{page}: no such file")
    return text


def _renew_page(page: Path, text: str) -> str:
    try:
        return renew(text)
    except InputError as error:
        raise InputError(f"{page.name}: {error}") from None
