"""`python -m bench`: check every op's results, time every op, answer a question end to end.

Without a command it runs `numerics`, `ops`, `decode` and `e2e` and prints a table of each;
`--report DIR` makes an HTML page and charts of their rows. A row is a JSON object, one per line of
the `--out` file: what was measured, on which machine and commit, and how far it is from the
roofline and from the exact result. A form with wrong results is not timed.
"""

import sys
from collections.abc import Sequence

from model.process.run import run_command
from model.terminal import Parser, dispatch

COMMANDS = {
    "all": ("bench.cli.commands:ALL", "numerics, ops, decode and e2e: the default command"),
    "ops": ("bench.cli.commands:OPS_TIMED", "errors and times of every op and its peers"),
    "numerics": (
        "bench.cli.commands:NUMERICS",
        "errors of every op on awkward shapes in every dtype",
    ),
    "decode": (
        "bench.cli.commands:DECODE",
        "a whole model's decode step by batch, prefix and suffix, with its time by part",
    ),
    "e2e": ("bench.cli.commands:E2E", "a question and a photo through whole models"),
    "roofline": ("bench.cli.commands:ROOFLINE", "this machine's copy bandwidth and matrix rate"),
    "sched": ("bench.cli.commands:SCHED", "the scheduler's CPU time per step"),
    "engine": ("bench.cli.commands:ENGINE", "whole engine steps with a full batch"),
    "stress": ("bench.stress.command", "random events on the engine, checked after each"),
    "packing": ("bench.cli.commands:PACKING", "gain from running many problems together (minutes)"),
    "replay": ("bench.cli.commands:REPLAY", "the simulator's error against the engine (minutes)"),
    "replicas": ("bench.replicas.command:REPLICAS", "what replicas on Ray gain, survive and cost"),
    "serve": ("bench.serve.command:SERVE", "load on an HTTP server, soak, and what HTTP costs"),
    "tune": ("bench.cli.commands:TUNE", "measure kernel configs on a GPU, write kernels/tuned/"),
    "memory": ("bench.cli.commands:MEMORY", "a long prompt's peak memory, next to its bound"),
    "dispatch": (
        "bench.cli.commands:DISPATCH",
        "the host's time per call, direct and as an operator of PyTorch",
    ),
    "cost": ("bench.cli.commands:COST", "bytes, balance and floors by arithmetic, without a GPU"),
    "fp8": ("bench.cli.commands:FP8", "effect of FP8 KV pages on a real model's predictions"),
    "needle": (
        "bench.needle.command:NEEDLE",
        "facts found in texts within and beyond a real model's context (minutes)",
    ),
    "generate": (
        "bench.generate.command:GENERATE",
        "many continuations of a prompt in transformers, the prompt read once (minutes)",
    ),
    "fold": ("bench.cli.commands:FOLD", "rounding errors of the projector's folded weights"),
    "validate": (
        "bench.validate.command",
        "every op and the tiny model against fp64 and other libraries",
    ),
    "compare": (
        "bench.compare.command",
        "what is slower between two commits, or two files of rows",
    ),
    "gate": ("bench.gate", "check that speed-ups on this CPU reach their minimums"),
    "convert": (
        "bench.formats.command",
        "rows to and from the formats of flashinfer-bench and pytest-benchmark",
    ),
    "report": ("bench.report.command", "rows as one HTML page and charts"),
    "peers": (
        "bench.cli.peers",
        "which peer libraries are installed, and how to get the others",
    ),
}


def main(argv: Sequence[str] | None = None, prog: str = "python -m bench") -> int:
    """Run the command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv.insert(0, "all")
    return dispatch(Parser(prog=prog, description=__doc__), COMMANDS, argv)


if __name__ == "__main__":
    run_command(main)
