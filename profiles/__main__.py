"""Profilers over the ops and the engine, and the recorded rows of every machine.

What the compiler made of a kernel (`static`, no GPU needed), time by span on any machine (`torch`),
a timeline or the counters of a GPU (`nsys`, `ncu`, `proton`), and all that a machine can measure as
rows on disk (`record`).
"""

from collections.abc import Sequence

from model.terminal import Parser, run_command
from profiles import launch, ncu, nsys, proton, record, static_command, tables, torch_trace

COMMANDS = {
    "record": (record, "all that this machine can measure, as rows in a folder"),
    "static": (static_command, "registers, spills, occupancy, SASS of every kernel, without a GPU"),
    "torch": (torch_trace, "PyTorch's profiler: a trace of an op or of decode steps, anywhere"),
    "nsys": (nsys, "Nsight Systems: timeline of a command, gaps between its kernels"),
    "ncu": (ncu, "Nsight Compute: counters of an op's kernels, and why warps stall"),
    "proton": (proton, "Triton's Proton: time of an op's kernels in a stream of calls"),
    "tables": (tables, "README's tables of measurements, from the committed rows"),
    "launch": (launch, "one case of an op between cudaProfilerStart and Stop, for a profiler"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    parser = Parser(prog="python -m profiles", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(argv)
    return options.run(options)


if __name__ == "__main__":
    run_command(main)
