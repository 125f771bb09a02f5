"""Plots of simulated runs: occupancy over time, and the distribution of times to answer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.errors import InputError
from model.text.files import check_target

SIZE, DPI = (9.0, 5.0), 130
DASHES = ("-", "--", "-.")  # as well as colours, for print and colour-blind readers


@dataclass(frozen=True)
class Curves:
    """The curves of one run; times in minutes."""

    policy: str
    answered: np.ndarray  # times to answer, ascending
    ends: np.ndarray  # of a timeline's bins
    running: np.ndarray
    kv: np.ndarray


def check_folder(folder: Path) -> None:
    """Create the folder. Raises InputError if it cannot be created, or matplotlib is missing."""
    pyplot()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from None


def occupancy(path: Path, workload: str, runs: Sequence[Curves]) -> None:
    """Plot KV in use (area) and decoding rollouts (line, log scale) over time, per policy."""
    figure, panels = pyplot().subplots(
        len(runs), 1, sharex=True, squeeze=False, figsize=(SIZE[0], 0.9 + 1.15 * len(runs))
    )
    max_running = max(run.running.max() for run in runs)
    for axes, run in zip(panels[:, 0], runs, strict=True):
        right = area_and_line(axes, run.policy, run.ends, 100 * run.kv, run.running)
        axes.set(ylim=(0, 100), ylabel="KV, %")
        right.set(yscale="log", ylim=(0.8, 1.3 * max_running))
    panels[-1, 0].set_xlabel("minutes")
    figure.suptitle(f"{workload}: KV pages in use and decoding rollouts", fontsize=12)
    figure.set_layout_engine("constrained")
    finish(figure, panels[:, 0], path)


def area_and_line(
    axes: Any,  # noqa: ANN401
    title: str,
    times: Sequence[float] | np.ndarray,
    kv: Sequence[float] | np.ndarray,
    running: Sequence[float] | np.ndarray,
) -> Any:  # noqa: ANN401
    """Draw KV in use as an area and rollouts as a line on a second axis, which is returned.

    `kv[i]` and `running[i]` hold from `times[i - 1]` (0 for the first) to `times[i]`.
    """
    times, kv, running = [0.0, *times], [kv[0], *kv], [running[0], *running]
    axes.fill_between(times, kv, step="pre", color="C0", alpha=0.3, linewidth=0)
    axes.yaxis.label.set_color("C0")
    axes.set_title(title, loc="left", fontsize=10, pad=3)
    right = axes.twinx()
    right.plot(times, running, drawstyle="steps-pre", color="C3", linewidth=1.2)
    right.set_ylabel("rollouts", color="C3")
    right.spines["top"].set_visible(False)
    return right


def answers(path: Path, workload: str, runs: Sequence[Curves]) -> None:
    """Plot the share of problems answered within a time, a line per policy."""
    figure, axes = pyplot().subplots(figsize=SIZE, layout="constrained")
    for number, run in enumerate(runs):
        share = 100 * np.arange(len(run.answered) + 1) / len(run.answered)
        times = np.concatenate([[0.0], run.answered])
        axes.step(times, share, where="post", **_style(number, run.policy))
    title = f"{workload}: time to answer"
    axes.set(xlabel="minutes from arrival", ylabel="problems answered, %", title=title)
    axes.set_ylim(0, 102)
    figure.legend(loc="outside right upper", frameon=False)
    finish(figure, (axes,), path)


def _style(number: int, label: str) -> dict:
    return {
        "label": label,
        "color": f"C{number % 10}",
        "linestyle": DASHES[number % len(DASHES)],
        "linewidth": 1.6,
    }


def finish(figure: Any, all_axes: Iterable[Any], path: Path) -> None:  # noqa: ANN401
    """Set grid and origin of the time axes, save the figure and close it."""
    check_target(path)
    for axes in all_axes:
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=DPI)
    pyplot().close(figure)


def pyplot() -> Any:  # noqa: ANN401
    """pyplot with a backend that needs no display. Raises InputError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
