"""Profilers over the ops and the engine, and the recorded rows of every machine.

The first minutes on a GPU (`first-light`), what the compiler made of a kernel (`static`, no GPU
needed), time by span on any machine (`torch`), a timeline or the counters of a GPU (`nsys`, `ncu`,
`proton`), and all that a machine can measure as rows on disk (`record`).
"""

from collections.abc import Sequence

from model.terminal import Parser, dispatch, run_command

COMMANDS = {
    "first-light": (
        "profiles.first_light.command",
        "the first minutes on a GPU: what works, what is wrong, times",
    ),
    "decisions": (
        "profiles.first_light.decisions",
        "what the rows of a first-light run say to do next, again",
    ),
    "record": ("profiles.runs.record", "all that this machine can measure, as rows in a folder"),
    "kernels": (
        "profiles.packs.command",
        "pack: all kernels compiled here for a GPU node; unpack there",
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
        "Nsight Compute: counters of an op's kernels, and why warps stall",
    ),
    "proton": (
        "profiles.profilers.proton",
        "Triton's Proton: time of an op's kernels in a stream of calls",
    ),
    "tables": (
        "profiles.tables.command",
        "the tables of README and docs/, from the committed rows",
    ),
    "launch": (
        "profiles.profilers.launch",
        "one case of an op between cudaProfilerStart and Stop, for a profiler",
    ),
}


def main(argv: Sequence[str] | None = None, prog: str = "python -m profiles") -> int:
    """Run the command; its exit code."""
    return dispatch(Parser(prog=prog, description=__doc__), COMMANDS, argv)


if __name__ == "__main__":
    run_command(main)
