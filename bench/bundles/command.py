"""`python -m bench peers`: list the peers that can be measured here, and install others.

`prepare` fills a folder on a machine with internet access; `install` installs from that folder on a
GPU machine without.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import model_peers
from bench.bundles.bundle import BUILT, ITEMS
from bench.bundles.flashinfer_modules import DEFAULT, MODULES
from bench.bundles.install import install
from bench.bundles.prepare import Target, prepare
from bench.measure.devices import parse_device
from bench.model_peers.peer import ModelPeer
from bench.peers.peer import Peer
from bench.suite import PEERS
from model.errors import InputError
from model.terminal import table

TARGET = Target()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions `list`, which is the default, `prepare` and `install`."""
    device = {"help": "cpu or cuda (default: cuda if there is one)"}
    as_json = {"action": "store_true", "help": "print one JSON document instead of a table"}
    parser.add_argument("--device", **device)
    parser.add_argument("--json", **as_json)
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    list_parser = actions.add_parser(
        "list", help="list peers, their libraries, and why they cannot be used (default)"
    )
    prepare_parser = actions.add_parser(
        "prepare", help="fetch and pack peers for a machine without internet"
    )
    install_parser = actions.add_parser(
        "install", help="install what `prepare` packed, without changing torch"
    )
    list_parser.add_argument("--device", default=argparse.SUPPRESS, **device)
    for action in (list_parser, prepare_parser, install_parser):  # also after the action's name
        action.add_argument("--json", default=argparse.SUPPRESS, **as_json)
    for action in (prepare_parser, install_parser):
        action.add_argument(
            "--dir", type=Path, required=True, metavar="DIR", help="the bundle's folder"
        )
        action.add_argument(
            "--only",
            nargs="+",
            default=(),
            metavar="ITEM",
            help=f"any of {', '.join(ITEMS)}, {BUILT}",
        )
    prepare_parser.add_argument(
        "--python", default=TARGET.python, help="Python version there (default: %(default)s)"
    )
    prepare_parser.add_argument(
        "--platform",
        default=TARGET.platform,
        help="platform tag of its wheels (default: %(default)s)",
    )
    prepare_parser.add_argument(
        "--build",
        nargs="*",
        metavar="MODULE",
        help="also compile FlashInfer modules with nvcc, which takes minutes "
        f"(default: {', '.join(DEFAULT)}; any of {', '.join(MODULES)})",
    )
    prepare_parser.add_argument(
        "--arch", default=TARGET.arch, help="CUDA architecture (default: %(default)s)"
    )
    install_parser.add_argument(
        "--target", type=Path, metavar="FOLDER", help="install into FOLDER, not into this Python"
    )


def run(options: argparse.Namespace) -> int:
    """Run the action; return 1 if an item could not be prepared or installed, else 0."""
    if options.action == "prepare":
        document = {"items": _prepare(options)}
        display = _display_prepared
    elif options.action == "install":
        document = {"items": install(options.dir, options.only, options.target)}
        display = _display_installed
    else:
        document = {"peers": listed(parse_device(options.device))}
        display = _display_listed
    if options.json:
        print(json.dumps(document))
    else:
        display(options, *document.values())
    return int(any(row.get("failure") for rows in document.values() for row in rows))


def listed(device: torch.device) -> list[dict]:
    """A row for each peer; `absent` is the reason why it cannot be used on `device`, or None."""
    of_ops = [_row(peer.op, peer, device) for peers in PEERS.values() for peer in peers.values()]
    of_models = [_row("whole model", peer, device) for peer in model_peers.PEERS.values()]
    return of_ops + of_models


def _row(op: str, peer: Peer | ModelPeer, device: torch.device) -> dict:
    return {
        "op": op,
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
            raise InputError(f"unknown item {name!r}; choose one of {', '.join(known)}")
    modules = () if options.build is None else options.build or DEFAULT
    if not modules and BUILT in options.only:
        modules = DEFAULT
    for name in modules:
        if name not in MODULES:
            raise InputError(f"unknown module {name!r}; choose one of {', '.join(MODULES)}")
    items = options.only or (*ITEMS, *([BUILT] if modules else ()))
    target = Target(options.python, options.platform, options.arch, tuple(modules))
    return prepare(options.dir, items, target)


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
    header = ("item", "pieces", " MiB", " seconds", "note")
    lines = [
        (
            row["item"],
            ", ".join(row["files"]) or "-",
            f"{row['bytes'] / 2**20:.1f}",
            f"{row['seconds']:.0f}",
            row["failure"] or ("already present" if row["kept"] else ""),
        )
        for row in rows
    ]
    table(f"{options.dir}", header, lines)
    total = sum(row["bytes"] for row in rows) / 2**20
    print(f"{total:.1f} MiB; next, on the GPU machine: python -m bench peers install --dir DIR")


def _display_installed(options: argparse.Namespace, rows: Sequence[dict]) -> None:
    lines = [(row["item"], row["failure"] or "yes") for row in rows]
    table(f"{options.dir}", ("item", "installed"), lines)
    print(f"before measuring: source {options.dir / 'env.sh'}")
