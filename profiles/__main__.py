"""Profilers over the ops and the engine, and the recorded rows of every machine.

The first minutes on a GPU (`first-light`), what the compiler made of a kernel (`static`, no GPU
needed), time by span on any machine (`torch`), a timeline or the counters of a GPU (`nsys`, `ncu`,
`proton`), and all that a machine can measure as rows on disk (`record`).
"""

import sys
from collections.abc import Sequence
from importlib import import_module

from model.terminal import Parser, run_command

COMMANDS = {
    "first-light": ("first_light", "the first minutes on a GPU: what works, what is wrong, times"),
    "decisions": ("decisions", "what the rows of a first-light run say to do next, again"),
    "record": ("record", "all that this machine can measure, as rows in a folder"),
    "kernels": ("kernels_command", "pack: all kernels compiled here for a GPU node; unpack there"),
    "static": (
        "static_command",
        "registers, spills, occupancy, SASS of all kernels, without a GPU",
    ),
    "torch": ("torch_trace", "PyTorch's profiler: a trace of an op or of decode steps, anywhere"),
    "nsys": ("nsys", "Nsight Systems: timeline of a command, gaps between its kernels"),
    "ncu": ("ncu", "Nsight Compute: counters of an op's kernels, and why warps stall"),
    "proton": ("proton", "Triton's Proton: time of an op's kernels in a stream of calls"),
    "tables": ("tables", "the tables of README and docs/, from the committed rows"),
    "launch": ("launch", "one case of an op between cudaProfilerStart and Stop, for a profiler"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code. Only its own module is imported: some need no torch."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="python -m profiles", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, (module_name, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if argv[:1] == [name]:
            module = import_module(f"profiles.{module_name}")
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    options = parser.parse_args(argv)
    return options.run(options)


if __name__ == "__main__":
    run_command(main)
