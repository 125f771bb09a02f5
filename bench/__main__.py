"""`python -m bench`. What it does is in command_line.py, imported after `run_command` has looked at
whose `kernels` is installed."""

from collections.abc import Sequence

from model.terminal import run_command


def main(argv: Sequence[str] | None = None, prog: str = "python -m bench") -> int:
    """Run the command; its exit code."""
    from bench import command_line

    return command_line.main(argv, prog)


if __name__ == "__main__":
    run_command(main)
