"""Profilers for the ops and the engine, and runs that record rows.

`first-light`: the first minutes on a GPU. `record`: everything that a machine can measure, as rows.
`static`: registers, spills and SASS of compiled kernels, without a GPU. `torch`: time by span on
any machine. `nsys`, `ncu`, `proton`: a GPU's timeline and counters.
"""

from collections.abc import Sequence

from model.process.run import run_command
from model.terminal import Parser, dispatch

COMMANDS = {
    "first-light": (
        "profiles.first_light.command",
        "the first minutes on a GPU: correctness and times of every kernel",
    ),
    "decisions": (
        "profiles.first_light.decisions",
        "show again what the rows of a first-light run say to do next",
    ),
    "record": (
        "profiles.runs.record",
        "measure everything that this machine can, as rows in a folder",
    ),
    "kernels": (
        "profiles.packs.command",
        "pack: compile all kernels here for a GPU node; unpack them there",
    ),
    "static": (
        "profiles.static.command",
        "registers, spills, occupancy, SASS of all kernels, without a GPU",
    ),
    "torch": (
        "profiles.profilers.torch_trace",
        "PyTorch's profiler: a trace of an op or of decode steps, anywhere",
    ),
    "nsys": (
        "profiles.profilers.nsys",
        "Nsight Systems: timeline of a command, gaps between its kernels",
    ),
    "ncu": (
        "profiles.profilers.ncu",
        "Nsight Compute: counters and warp stalls of an op's kernels",
    ),
    "proton": (
        "profiles.profilers.proton",
        "Triton's Proton: time of an op's kernels in a stream of calls",
    ),
    "tables": (
        "profiles.tables.command",
        "check or renew the generated tables and plot of README and docs/",
    ),
    "launch": (
        "profiles.profilers.launch",
        "one case of an op between cudaProfilerStart and Stop, to be profiled",
    ),
}


def main(argv: Sequence[str] | None = None, prog: str = "python -m profiles") -> int:
    """Run the command and return its exit code."""
    return dispatch(Parser(prog=prog, description=__doc__), COMMANDS, argv)


if __name__ == "__main__":
    run_command(main)
