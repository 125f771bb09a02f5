"""Rows as one HTML page and pictures: `python -m bench report rows.jsonl ... --out DIR`.

The page holds its pictures and asks for nothing from anywhere; they lie beside it as PNG, too. Of
rows measured twice the latest is shown. What older versions of the files, as git has them, say
about the same device becomes a history over commits.
"""

import argparse
import base64
import json
import struct
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from bench.report import rows as report_rows
from bench.report.rows import Measurements, name_of
from bench.report.sections import SECTIONS, Block, Section
from bench.report.tables import Table, skipped_lines
from model.errors import InputError
from model.terminal import track
from pacore_sched.sim.plots import check_folder

PAGE = "index.html"


class Picture(NamedTuple):
    """A PNG as the page holds it."""

    base64: str
    width: int
    height: int
    alt: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which rows, and where to."""
    parser.add_argument("rows", nargs="+", type=Path, metavar="ROWS", help="JSONL files of rows")
    parser.add_argument(
        "--out", type=Path, default=Path("report"), metavar="DIR", help="default: report"
    )
    parser.add_argument(
        "--no-history", action="store_true", help="leave out what git has of older rows"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document of what was written")


def run(options: argparse.Namespace) -> int:
    """Write the report and say where it is; 0 even if rows say that something failed."""
    rows = report_rows.read(options.rows)
    paths = [] if options.no_history else options.rows
    page, *pictures = write(
        rows, options.out, [row for p in paths for row in report_rows.committed(p)]
    )
    if options.json:
        failed = sum(bool(row.get("failure")) for row in rows)
        document = {"page": str(page), "pictures": list(map(str, pictures)), "rows": len(rows)}
        print(json.dumps(document | {"failures": failed}))
    else:
        print(*(page, *pictures), sep="\n")
    return 0


def check(out: Path) -> None:
    """Make the folder; raises InputError if that, or a report, is not possible on this machine."""
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise InputError("a report needs jinja2: pip install jinja2") from None
    check_folder(out)


def write(rows: Sequence[dict], out: Path, before: Sequence[dict] = ()) -> list[Path]:
    """Write the page and its pictures into `out`; returns their paths, the page's first.

    `before` are rows of older files, for the history. Raises InputError without rows, and if `out`
    cannot be written or matplotlib or jinja2 is not here.
    """
    if not rows:
        raise InputError("no rows to report")
    check(out)
    devices = report_rows.by_device(rows, before)
    anchors = _distinct([name_of(found.device) for found in devices])
    sections: dict[tuple[str, str], Section | None] = {}
    work = list(product(zip(anchors, devices, strict=True), SECTIONS.items()))
    try:
        for (anchor, found), (title, make) in track(work, "report"):
            stem = out / f"{anchor}-{name_of(title)}"
            sections[anchor, title] = make(found, str(stem))
        parts = [
            _part(anchor, found, {title: sections[anchor, title] for title in SECTIONS})
            for anchor, found in zip(anchors, devices, strict=True)
        ]
        page = out / PAGE
        page.write_text(_html(devices, parts), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {error.filename or out}: {error.strerror}") from None
    made = [section for section in sections.values() if section]
    return [
        page,
        *(path for section in made for block in section.blocks for path in block.pictures),
    ]


def _part(anchor: str, found: Measurements, sections: dict[str, Section | None]) -> dict:
    """What the template shows of one device."""
    versions = {row["version"]: None for row in found.latest if row.get("version")}
    return {
        "anchor": anchor,
        "device": found.device,
        "versions": list(map(str, versions)),
        "skipped": skipped_lines(found),
        "left_out": [title for title, section in sections.items() if section is None],
        "sections": [
            {
                "anchor": name_of(title),
                "title": title,
                "text": section.text,
                "blocks": [_block(title, found.device, block) for block in section.blocks],
            }
            for title, section in sections.items()
            if section
        ],
    }


def _block(section: str, device: str, block: Block) -> dict:
    alt = ", ".join(filter(None, (section, block.title, device)))
    pictures = [_embedded(path, alt) for path in block.pictures]
    return {"title": block.title, "pictures": pictures, "table": block.table}


def _embedded(path: Path, alt: str) -> Picture:
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])  # of the header chunk
    return Picture(base64.b64encode(data).decode(), width, height, alt)


def _html(devices: Sequence[Measurements], parts: Sequence[dict]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        parts=parts,
        origins=_origins(devices),
        count=sum(len(found.latest) for found in devices),
        failures=[
            f"{found.device}: {_named(row)}: {row['failure']}"
            for found in devices
            for row in found.latest
            if row.get("failure")
        ],
    )


def _origins(devices: Sequence[Measurements]) -> Table:
    """Where the rows come from, a line per device."""
    names = ("driver", "torch", "triton", "commit")
    lines = []
    for found in devices:
        seen = [
            ", ".join(dict.fromkeys(str(row[name]) for row in found.latest if row.get(name)))
            for name in names
        ]
        times = sorted(str(row["time"]) for row in found.latest if row.get("time"))
        span = " to ".join(dict.fromkeys((times[0], times[-1]))) if times else "not recorded"
        skipped = sum(bool(row.get("skipped")) for row in found.latest)
        counts = (len(found.latest), skipped, len(found.older))
        lines.append([found.device, *seen, span, *map(str, counts)])
    header = ("device", "driver", "torch", "triton", "commits", "measured")
    return Table("", (*header, " rows", " skipped", " older rows"), lines)


def _named(row: dict) -> str:
    names = (row.get(name) for name in ("op", "case", "impl", "policy", "dtype"))
    return ", ".join(str(name) for name in names if name)


def _distinct(names: Sequence[str]) -> list[str]:
    """Names with a number behind those that were there before."""
    return [
        name if name not in names[:number] else f"{name}-{number + 1}"
        for number, name in enumerate(names)
    ]
