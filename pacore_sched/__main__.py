"""`python -m pacore_sched COMMAND`: answer questions with PaCoRe, or simulate its scheduling."""

from collections.abc import Sequence

from model.process.run import run_command
from model.terminal import Parser, dispatch

COMMANDS = {
    "ask": ("pacore_sched.cli.ask", "answer one question"),
    "batch": ("pacore_sched.cli.batch", "answer the questions of a file"),
    "sample": ("pacore_sched.cli.sample", "draw several samples for every prompt of a file"),
    "serve": ("pacore_sched.cli.serve", "answer requests over HTTP, with OpenAI's interface"),
    "simulate": ("pacore_sched.cli.simulate", "compare scheduling policies on simulated GPUs"),
}


def main(argv: Sequence[str] | None = None, prog: str = "python -m pacore_sched") -> int:
    """Run the command and return its exit code."""
    return dispatch(Parser(prog=prog, description=__doc__), COMMANDS, argv)


if __name__ == "__main__":
    run_command(main)
