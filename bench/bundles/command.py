"""`python -m bench peers`: which peers can be measured here, and how the others get here.

`prepare` fills a folder on a connected machine, `install` reads it on a GPU machine without the
internet.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.bundles.bundle import BUILT, ITEMS
from bench.bundles.flashinfer_modules import DEFAULT, MODULES
from bench.bundles.install import install
from bench.bundles.prepare import Target, prepare
from bench.ops import parse_device
from bench.peers import PEERS
from bench.peers.peer import Peer
from model.errors import InputError
from model.terminal import table

TARGET = Target()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`list`, which is the default, `prepare` and `install`."""
    device = {"help": "cpu or cuda (default: cuda if there is one)"}
    as_json = {"action": "store_true", "help": "no table; one JSON document"}
    parser.add_argument("--device", **device)
    parser.add_argument("--json", **as_json)
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    telling = actions.add_parser(
        "list", help="every peer, its library, and why it cannot be used (default)"
    )
    making = actions.add_parser("prepare", help="fetch and pack peers for a machine without net")
    reading = actions.add_parser("install", help="install what `prepare` packed; torch stays")
    telling.add_argument("--device", default=argparse.SUPPRESS, **device)
    for action in (telling, making, reading):  # also behind the action's name
        action.add_argument("--json", default=argparse.SUPPRESS, **as_json)
    for action in (making, reading):
        action.add_argument("--dir", type=Path, required=True, metavar="DIR", help="the bundle")
        action.add_argument(
            "--only", nargs="+", default=(), metavar="ITEM", help=f"of {', '.join(ITEMS)}, {BUILT}"
        )
    making.add_argument(
        "--python", default=TARGET.python, help="of that machine (default: %(default)s)"
    )
    making.add_argument("--platform", default=TARGET.platform, help="as in a wheel's name")
    making.add_argument(
        "--build",
        nargs="*",
        metavar="MODULE",
        help="compile FlashInfer's modules, too, with nvcc, for minutes "
        f"(default: {', '.join(DEFAULT)}; of {', '.join(MODULES)})",
    )
    making.add_argument("--arch", default=TARGET.arch, help="to compile for (default: %(default)s)")
    reading.add_argument(
        "--target", type=Path, metavar="FOLDER", help="here instead of into this Python"
    )


def run(options: argparse.Namespace) -> int:
    """1 if an item could not be made or installed, else 0."""
    if options.action == "prepare":
        found = {"items": _prepare(options)}
        display = _display_prepared
    elif options.action == "install":
        found = {"items": install(options.dir, options.only, options.target)}
        display = _display_installed
    else:
        found = {"peers": listed(parse_device(options.device))}
        display = _display_listed
    if options.json:
        print(json.dumps(found))
    else:
        display(options, *found.values())
    return int(any(row.get("failure") for rows in found.values() for row in rows))


def listed(device: torch.device) -> list[dict]:
    """A row for every peer; `absent` says why it cannot be used on `device`, or is None."""
    return [_row(peer, device) for peers in PEERS.values() for peer in peers.values()]


def _row(peer: Peer, device: torch.device) -> dict:
    return {
        "op": peer.op,
        "peer": peer.name,
        "library": peer.library.name,
        "version": peer.library.version(),
        "absent": peer.library.absence(device),
        "get": peer.library.get,
    }


def _prepare(options: argparse.Namespace) -> list[dict]:
    known = (*ITEMS, BUILT)
    for name in options.only:
        if name not in known:
            raise InputError(f"unknown item {name!r}; choose of {', '.join(known)}")
    modules = () if options.build is None else options.build or DEFAULT
    if not modules and BUILT in options.only:
        modules = DEFAULT
    for name in modules:
        if name not in MODULES:
            raise InputError(f"unknown module {name!r}; choose of {', '.join(MODULES)}")
    chosen = options.only or (*ITEMS, *([BUILT] if modules else ()))
    target = Target(options.python, options.platform, options.arch, tuple(modules))
    return prepare(options.dir, chosen, target)


def _display_listed(options: argparse.Namespace, rows: Sequence[dict]) -> None:
    header = ("op", "peer", "library", "version", "usable here", "how to get it")
    lines = [
        (
            *(row[name] for name in ("op", "peer", "library")),
            row["version"] or "-",
            row["absent"] or "yes",
            row["get"] if row["absent"] else "",
        )
        for row in rows
    ]
    table("peers", header, lines)


def _display_prepared(options: argparse.Namespace, rows: Sequence[dict]) -> None:
    header = ("item", "pieces", " MiB", " seconds", "")
    lines = [
        (
            row["item"],
            ", ".join(row["files"]) or "-",
            f"{row['bytes'] / 2**20:.1f}",
            f"{row['seconds']:.0f}",
            row["failure"] or ("was there" if row["kept"] else ""),
        )
        for row in rows
    ]
    table(f"{options.dir}", header, lines)
    total = sum(row["bytes"] for row in rows) / 2**20
    print(f"{total:.1f} MiB; on the other machine: python -m bench peers install --dir DIR")


def _display_installed(options: argparse.Namespace, rows: Sequence[dict]) -> None:
    table(f"{options.dir}", ("item", ""), [(row["item"], row["failure"] or "yes") for row in rows])
    print(f"before measuring: source {options.dir / 'env.sh'}")
