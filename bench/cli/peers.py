"""`python -m bench peers`: the libraries that ops and whole models can be compared with.

For each peer of an op, and for each program that runs a whole model: the library's version here,
why it cannot be used, and how to get it. docs/peers.md says more.
"""

import argparse
import json

import torch

from bench import model_peers
from bench.measure.devices import parse_device
from bench.model_peers.peer import ModelPeer
from bench.peers.peer import Peer
from bench.suite import PEERS
from model.terminal import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--op", nargs="+", choices=PEERS, metavar="OP", help=f"any of {', '.join(PEERS)}"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document instead of a table"
    )


def run(options: argparse.Namespace) -> int:
    """Print the list; returns 0."""
    device = parse_device(options.device)
    rows = [_row(op, peer, device) for op in options.op or PEERS for peer in PEERS[op].values()]
    if not options.op:
        rows += [_row("whole model", peer, device) for peer in model_peers.PEERS.values()]
    if options.json:
        print(json.dumps({"peers": rows}))
        return 0
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
    return 0


def _row(op: str, peer: Peer | ModelPeer, device: torch.device) -> dict:
    """One peer; `absent` is the reason why it cannot be used on `device`, or None."""
    return {
        "op": op,
        "peer": peer.name,
        "library": peer.library.name,
        "version": peer.library.version(),
        "absent": peer.library.absence(device),
        "get": peer.library.get,
    }
