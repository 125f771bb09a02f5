"""`python -m model COMMAND`: facts about a model, without loading its weights."""

from collections.abc import Sequence

from model.process.run import run_command
from model.terminal import Parser, dispatch

COMMANDS = {
    "describe": ("model.describe", "parameters, tensors and bytes of a model"),
}


def main(argv: Sequence[str] | None = None, prog: str = "python -m model") -> int:
    """Run the command and return its exit code."""
    return dispatch(Parser(prog=prog, description=__doc__), COMMANDS, argv)


if __name__ == "__main__":
    run_command(main)
