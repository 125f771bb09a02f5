"""`python -m bench`: check the numbers of every op, time them, answer a question end to end.

Without a command: `numerics`, `ops`, `decode` and `e2e`, each as a table; `--report DIR` makes an
HTML page and pictures of their rows. A row is a JSON object, on a line of a file with `--out`; it
says what was measured, on what and at which commit, and how far it is from the roofline and from
the exact result. A form whose numbers are wrong gets no time.
"""

import sys
from collections.abc import Sequence

from model.terminal import Parser, dispatch, run_command

COMMANDS = {
    "all": ("bench.commands:ALL", "numerics, ops, decode, e2e: what there is without a command"),
    "ops": ("bench.commands:OPS_TIMED", "errors and times of every op beside its peers"),
    "numerics": (
        "bench.commands:NUMERICS",
        "errors of every op on awkward shapes in every dtype",
    ),
    "decode": (
        "bench.commands:DECODE",
        "a decode step of a whole model by batch, prefix and suffix, and what it is made of",
    ),
    "e2e": ("bench.commands:E2E", "a question and a photo through whole models"),
    "roofline": ("bench.commands:ROOFLINE", "what this machine can do at best"),
    "sched": ("bench.commands:SCHED", "what the scheduler costs per step"),
    "engine": ("bench.commands:ENGINE", "whole steps of the engine while its batch is full"),
    "packing": ("bench.commands:PACKING", "what packing many problems is worth (minutes)"),
    "replay": ("bench.commands:REPLAY", "how far the simulator is from the engine (minutes)"),
    "tune": ("bench.commands:TUNE", "measure tile choices on a GPU, write kernels/tuned/"),
    "cost": ("bench.commands:COST", "bytes, balance and floors by arithmetic, without a GPU"),
    "fp8": ("bench.commands:FP8", "what FP8 KV pages do to a real model"),
    "fold": ("bench.commands:FOLD", "what folding the projector's layers does to its numbers"),
    "validate": (
        "bench.validate.command",
        "every op and the tiny model against fp64 and other libraries",
    ),
    "compare": (
        "bench.compare.command",
        "two commits, or two files of rows: what has become slower",
    ),
    "gate": ("bench.gate", "speed-ups on this CPU against floors"),
    "report": ("bench.report.command", "rows as one HTML page and pictures"),
    "peers": (
        "bench.bundles.command",
        "which libraries to compare with are here, and how to get them",
    ),
}


def main(argv: Sequence[str] | None = None, prog: str = "python -m bench") -> int:
    """Run the command; its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv.insert(0, "all")
    return dispatch(Parser(prog=prog, description=__doc__), COMMANDS, argv)


if __name__ == "__main__":
    run_command(main)
