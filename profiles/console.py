"""`step3vl-pacore COMMAND`: the commands of all rooms under one name."""

import sys
from importlib import import_module

from model.process.run import run_command
from model.terminal import Parser, dispatch
from pacore_sched.__main__ import COMMANDS

NAME = "step3vl-pacore"
ROOMS = {
    "bench": "errors and times of every op, decode steps, whole answers",
    "profiles": "the first minutes on a GPU, profilers, compiled kernels",
    "model": "the weights and sizes of a model, without loading it",
}


def main() -> None:
    """The distribution's entry point."""
    run_command(_main)


def _main() -> int:
    room, *argv = sys.argv[1:] or [""]
    if room in ROOMS:
        return import_module(f"{room}.__main__").main(argv, prog=f"{NAME} {room}")
    import kernels

    parser = Parser(prog=NAME, description=__doc__)
    parser.add_argument("--version", action="version", version=f"{NAME} {kernels.__version__}")
    rooms = {name: (f"{name}.__main__", text) for name, text in ROOMS.items()}
    return dispatch(parser, COMMANDS | rooms, None)
