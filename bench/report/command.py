"""`python -m bench report rows.jsonl ... --out DIR`: write an HTML page and pictures of rows.

The page embeds its pictures and loads nothing from elsewhere; the pictures are also written next to
it as PNG. If something was measured twice, the latest row is shown. Rows of the same device in
older versions of the files in git become a history over commits.
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
from bench.report.rows import Measurements, slug
from bench.report.sections import SECTIONS, Block, Section
from bench.report.tables import skipped_lines
from bench.rows.columns import Table
from model.errors import InputError
from model.terminal import track
from model.text.files import check_target
from pacore_sched.sim.plots import check_folder

PAGE = "index.html"


class Picture(NamedTuple):
    """A PNG as it is embedded in the page."""

    base64: str
    width: int
    height: int
    alt: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("rows", nargs="+", type=Path, metavar="ROWS", help="JSONL files of rows")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report"),
        metavar="DIR",
        help="folder to write to (default: report)",
    )
    parser.add_argument("--no-history", action="store_true", help="do not read older rows from git")
    parser.add_argument(
        "--json", action="store_true", help="print the written paths as one JSON document"
    )


def run(options: argparse.Namespace) -> int:
    """Write the report and print its paths; return 0 even if rows contain failures."""
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
    """Create the folder; raises InputError if it cannot be written, or matplotlib or jinja2 is
    missing."""
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise InputError("a report needs jinja2: pip install jinja2") from None
    check_folder(out)
    check_target(out / PAGE)


def write(rows: Sequence[dict], out: Path, older_rows: Sequence[dict] = ()) -> list[Path]:
    """Write the page and its pictures into `out`; returns their paths, the page's first.

    `older_rows` are for the history only. Raises InputError if there are no rows, `out` cannot be
    written, or matplotlib or jinja2 is missing.
    """
    if not rows:
        raise InputError("no rows to report")
    check(out)
    devices = report_rows.by_device(rows, older_rows)
    anchors = _distinct([slug(measurements.device) for measurements in devices])
    sections: dict[tuple[str, str], Section | None] = {}
    work = list(product(zip(anchors, devices, strict=True), SECTIONS.items()))
    try:
        for (anchor, measurements), (title, build) in track(work, "report"):
            stem = out / f"{anchor}-{slug(title)}"
            sections[anchor, title] = build(measurements, str(stem))
        parts = [
            _part(anchor, measurements, {title: sections[anchor, title] for title in SECTIONS})
            for anchor, measurements in zip(anchors, devices, strict=True)
        ]
        page = out / PAGE
        page.write_text(_html(devices, parts), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {error.filename or out}: {error.strerror}") from None
    shown = [section for section in sections.values() if section]
    return [
        page,
        *(path for section in shown for block in section.blocks for path in block.pictures),
    ]


def _part(anchor: str, measurements: Measurements, sections: dict[str, Section | None]) -> dict:
    """The template's values for one device."""
    versions = [str(row["version"]) for row in measurements.latest if row.get("version")]
    return {
        "anchor": anchor,
        "device": measurements.device,
        "versions": list(dict.fromkeys(versions)),
        "skipped": skipped_lines(measurements),
        "empty_sections": [title for title, section in sections.items() if section is None],
        "sections": [
            {
                "anchor": slug(title),
                "title": title,
                "text": section.text,
                "blocks": [_block(title, measurements.device, block) for block in section.blocks],
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
    width, height = struct.unpack(">II", data[16:24])  # in the PNG's header chunk
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
        count=sum(len(measurements.latest) for measurements in devices),
        failures=[
            f"{measurements.device}: {_named(row)}: {row['failure']}"
            for measurements in devices
            for row in measurements.latest
            if row.get("failure")
        ],
    )


def _origins(devices: Sequence[Measurements]) -> Table:
    """A table of the rows' origins, a line per device."""
    names = ("driver", "torch", "triton", "commit")
    lines = []
    for measurements in devices:
        values = [
            ", ".join(dict.fromkeys(str(row[name]) for row in measurements.latest if row.get(name)))
            for name in names
        ]
        times = sorted(str(row["time"]) for row in measurements.latest if row.get("time"))
        span = " to ".join(dict.fromkeys((times[0], times[-1]))) if times else "not recorded"
        skipped = sum(bool(row.get("skipped")) for row in measurements.latest)
        counts = (len(measurements.latest), skipped, len(measurements.older))
        lines.append([measurements.device, *values, span, *map(str, counts)])
    header = ("device", "driver", "torch", "triton", "commits", "measured")
    return Table("", (*header, " rows", " skipped", " older rows"), lines)


def _named(row: dict) -> str:
    names = (row.get(name) for name in ("op", "case", "impl", "policy", "dtype"))
    return ", ".join(str(name) for name in names if name)


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number after each that repeats an earlier one."""
    return [
        name if name not in names[:number] else f"{name}-{number + 1}"
        for number, name in enumerate(names)
    ]
