"""`python -m pacore_sched simulate`: compare scheduling policies on a virtual clock.

Every policy runs the same problems with the same lengths. A table shows medians over seeds with
their spread, and each policy's gain over "fcfs" and "one-at-a-time". `--compare` repeats all runs
without shared reads and with FP8 KV; `--out` adds pictures.
"""

import argparse
import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import active_children, parent_process
from pathlib import Path
from threading import Thread

import numpy as np

from model.config import preset
from model.errors import InputError
from model.terminal import add_rope_scaling, integer, progress, real, stop_signals, track
from model.text.files import check_target
from pacore_sched.answers.rounds import MAX_WIDTH, parse_widths, round_widths
from pacore_sched.sched.policy import POLICIES
from pacore_sched.sched.view_queue import DEFAULT_VISION_BUDGET, VISION_BUDGETS
from pacore_sched.sim import plots
from pacore_sched.sim.cluster import Setting, simulate
from pacore_sched.sim.cost_model import KV_DTYPES
from pacore_sched.sim.machine import MACHINES, find_machine
from pacore_sched.sim.metrics import metrics_row, timeline, times_to_answer
from pacore_sched.sim.report import medians, print_report
from pacore_sched.sim.trace import read_trace, trace_problems
from pacore_sched.sim.workload import (
    MAX_TOKENS,
    SIGMA_W,
    WORKLOADS,
    SimProblem,
    Workload,
    bursty_arrivals,
    chat_requests,
    find_workload,
    photo_requests,
    poisson_arrivals,
)

# Workloads of single requests: their numbers, and what draws them.
REQUESTS: dict[str, tuple[int, Callable[[int, int, Sequence[float]], list[SimProblem]]]] = {
    "deepseek-r1": (2000, chat_requests),
    "photos-720p": (1000, photo_requests),
}
BINS = 400  # per timeline
MAX_ROLLOUTS = 10**7  # of one workload, over all seeds: 0.4 GB, and days of simulation
ARRIVALS = {"poisson": poisson_arrivals, "bursty": bursty_arrivals}


@dataclass(frozen=True)
class SimRun:
    """One run: the problems and the setting that they run in."""

    workload: str
    sigma_w: float | None
    seed: int
    problems: Sequence[SimProblem]
    setting: Setting
    slo_s: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `simulate`."""
    add = parser.add_argument
    names = ", ".join([*WORKLOADS, *REQUESTS])
    add("--workload", default="all", help=f"{names}, all, or a trace: Azure .csv, Mooncake .jsonl")
    add("--policy", nargs="+", default=["all"], help=f"all, or some of {', '.join(POLICIES)}")
    add("--model", default="step3-vl-10b", help="preset whose shapes are simulated")
    add_rope_scaling(parser)
    add("--gpu", default="h200", help=f"one of {', '.join(MACHINES)}")
    add("--gpus", type=integer(1, 4096), default=1, help="replicas of the model")
    add(
        "--migrate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with several GPUs: move rollouts to less loaded GPUs when no problem waits",
    )
    add("--seeds", type=integer(1, 1000), default=5, help="number of seeds, from 0")
    add(
        "--problems",
        type=integer(1, MAX_ROLLOUTS),
        help="number of problems; default: the workload's",
    )
    add("--widths", help="rollouts per round, e.g. 16 or 32,4; default: the workload's")
    add(
        "--sigma-w",
        type=real(0, 3),
        nargs="+",
        default=[SIGMA_W],
        help="spread of lengths in a problem",
    )
    add("--max-tokens", type=integer(1, 10**6), default=MAX_TOKENS, help="limit per rollout")
    add(
        "--need",
        type=real(0, 1, exclusive=True),
        default=1.0,
        help="share of a round that the next round waits for",
    )
    add(
        "--arrivals",
        choices=["all-at-once", *ARRIVALS],
        default="all-at-once",
        help="when problems arrive: together, or at random times at --rate",
    )
    add(
        "--rate",
        type=real(1e-9, 1e9),
        default=0.02,
        help="arriving problems per second and GPU",
    )
    add(
        "--concurrency",
        type=integer(1, 10**6),
        help="submit a problem when one of this many is answered; default: see --arrivals",
    )
    add("--slo", type=real(1e-9, 1e9), help="time limit for an answer in minutes; adds goodput")
    add(
        "--shared-reads",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read the KV that rollouts share once per step, not once per rollout",
    )
    add(
        "--vision-budget",
        choices=list(VISION_BUDGETS),
        default=DEFAULT_VISION_BUDGET,
        help="how much encoding images may slow decoding",
    )
    add("--kv", choices=KV_DTYPES, default="bf16", help="dtype of KV")
    add("--compare", action="store_true", help="also run without shared reads and with FP8 KV")
    add(
        "--max-running",
        type=integer(1, MAX_WIDTH),
        default=256,
        help="limit of decoding rollouts per GPU",
    )
    add(
        "--token-budget",
        type=integer(1, 10**6),
        default=2048,
        help="limit of tokens written per step",
    )
    add("--page-size", type=integer(1, 4096), default=64, help="tokens per KV page")
    add("--jobs", type=integer(1, 1024), default=os.cpu_count() or 1, help="number of processes")
    add("--out", type=Path, help="folder for pictures, rows and medians")
    add("--json", action="store_true", help="end with one line: a JSON document of all rows")


def run(options: argparse.Namespace) -> int:
    """The `simulate` command. Raises InputError for invalid options."""
    _check(options)
    if options.out:
        plots.check_folder(options.out)
    runs = list(_runs(options))
    if options.out:
        for path in _paths(options.out, [run.workload for run in runs]):
            check_target(path)
    rows: list[dict] = []
    curves: dict[str, list[plots.Curves]] = {}
    for run, (row, run_curves) in zip(runs, _run_all(runs, options.jobs), strict=True):
        rows.append(row)
        first = run.seed == 0 and run.sigma_w in (None, options.sigma_w[0])
        if first and _variant(run.setting) == (options.shared_reads, options.kv):
            curves.setdefault(run.workload, []).append(run_curves)
    print_report(rows, (options.shared_reads, options.kv))
    if options.out:
        for path in _write(options.out, rows, curves):
            print(f"wrote {path}")
    if options.json:
        print(json.dumps({"rows": rows}))
    return 0


def simulate_run(run: SimRun) -> tuple[dict, plots.Curves]:
    """The row of one run, and the curves to draw."""
    result = simulate(run.problems, run.setting)
    row = metrics_row(result, run.workload, run.seed, run.slo_s)
    ends, running, kv = timeline(result, BINS)
    answered = np.sort(times_to_answer(result)) / 60
    return row | {"sigma_w": run.sigma_w}, plots.Curves(
        run.setting.policy, answered, ends / 60, running, kv
    )


def _run_all(runs: Sequence[SimRun], processes: int) -> list[tuple[dict, plots.Curves]]:
    """The results of all runs, in order."""
    if processes == 1 or len(runs) == 1:
        return [simulate_run(run) for run in track(runs, "simulate")]
    done: dict[int, tuple[dict, plots.Curves]] = {}
    pool = ProcessPoolExecutor(min(processes, len(runs)), initializer=_begin_worker)
    with pool, progress("simulate", len(runs)) as advance:
        futures = {pool.submit(simulate_run, run): index for index, run in enumerate(runs)}
        try:
            for future in as_completed(futures):
                done[futures[future]] = future.result()
                advance(1)
        except BaseException as error:  # a failed run or Ctrl-C: do not wait for the others
            for process in active_children():
                process.kill()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise InputError(
                    "a process of the simulation was killed, perhaps because memory ran out: fewer"
                    " --jobs need less"
                ) from None
            raise
    return [done[index] for index in range(len(runs))]


def _begin_worker() -> None:
    """Let this process end in silence with Ctrl-C, and with its parent even if that is killed."""
    if signal.SIGINT in stop_signals():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _runs(options: argparse.Namespace) -> Iterator[SimRun]:
    config = preset(options.model)
    if options.rope_scaling is not None:
        config = config.with_rope_scaling(options.rope_scaling)
    base = Setting(
        gpus=options.gpus,
        machine=find_machine(options.gpu),
        config=config,
        shared_reads=options.shared_reads,
        kv_dtype=options.kv,
        max_running=options.max_running,
        token_budget=options.token_budget,
        page_size=options.page_size,
        max_tokens=options.max_tokens,
        need_share=options.need,
        migrate=options.migrate,
        vision_budget=options.vision_budget,
        concurrency=options.concurrency,
    )
    settings = [base]
    if options.compare:
        others = [replace(base, shared_reads=False, kv_dtype="bf16")]
        others += [replace(base, shared_reads=True, kv_dtype=kv) for kv in KV_DTYPES]
        settings += [other for other in others if _variant(other) != _variant(base)]
    policies = list(POLICIES) if "all" in options.policy else options.policy
    slo_s = options.slo * 60 if options.slo else None
    for name, sigma_w, seed, problems in _workloads(options):
        for policy in policies:
            for setting in settings:
                yield SimRun(name, sigma_w, seed, problems, replace(setting, policy=policy), slo_s)


def _workloads(
    options: argparse.Namespace,
) -> Iterator[tuple[str, float | None, int, Sequence[SimProblem]]]:
    """Yields (name, sigma_w, seed, problems) for all of --workload, --sigma-w and --seeds."""
    name, seeds = options.workload, range(options.seeds)
    if name in REQUESTS:
        default, draw = REQUESTS[name]
        count = options.problems or default
        _check_size(options, count, ())
        for seed in seeds:
            arrivals = _arrivals(options, count, seed) or [0.0] * count
            yield name, None, seed, draw(count, seed, arrivals)
    elif name == "all" or name in WORKLOADS:
        workloads = [_workload(options, each) for each in (WORKLOADS if name == "all" else [name])]
        for workload in workloads:
            _check_size(options, workload.problems, workload.widths)
        for workload in workloads:
            for sigma_w in options.sigma_w:
                variant = replace(workload, sigma_w=sigma_w)
                for seed in seeds:
                    times = _arrivals(options, variant.problems, seed)
                    yield variant.name, sigma_w, seed, variant.draw(seed, times)
    elif Path(name).suffix in (".csv", ".jsonl") or Path(name).exists():
        requests = read_trace(name)[: options.problems]
        widths = parse_widths(options.widths or "")
        _check_size(options, len(requests), widths)
        for sigma_w in options.sigma_w if options.widths else [0.0]:
            for seed in seeds:
                problems = trace_problems(requests, widths, sigma_w, seed, options.max_tokens)
                yield Path(name).name, sigma_w, seed, problems
    else:
        known = ", ".join([*WORKLOADS, *REQUESTS, "all"])
        raise InputError(f"workload {name!r} is neither a trace file nor one of {known}")


def _workload(options: argparse.Namespace, name: str) -> Workload:
    workload = find_workload(name)
    return replace(
        workload,
        max_tokens=options.max_tokens,
        problems=options.problems or workload.problems,
        widths=workload.widths if options.widths is None else parse_widths(options.widths),
    )


def _arrivals(options: argparse.Namespace, count: int, seed: int) -> list[float] | None:
    if options.arrivals == "all-at-once":
        return None
    return ARRIVALS[options.arrivals](count, options.rate * options.gpus, seed)


def _check(options: argparse.Namespace) -> None:
    """Raise InputError for an unknown policy, or limits that exclude each other."""
    for policy in options.policy:
        if policy not in (*POLICIES, "all"):
            known = ", ".join([*POLICIES, "all"])
            raise InputError(f"unknown policy {policy!r}; choose from {known}")
    if options.token_budget < options.max_running:
        raise InputError("--token-budget must be at least --max-running")
    if options.concurrency and options.arrivals != "all-at-once":
        raise InputError("--concurrency and --arrivals exclude each other")


def _check_size(options: argparse.Namespace, problems: int, widths: Sequence[int]) -> None:
    """Raise InputError for more rollouts than MAX_ROLLOUTS: all lengths are drawn first."""
    draws = options.seeds * len(options.sigma_w) * problems
    if (rollouts := draws * sum(round_widths(widths))) > MAX_ROLLOUTS:
        raise InputError(
            f"--seeds, --sigma-w, --problems and --widths make {rollouts:,} rollouts;"
            f" at most {MAX_ROLLOUTS:,} are simulated"
        )


def _variant(setting: Setting) -> tuple[bool, str]:
    return setting.shared_reads, setting.kv_dtype


def _write(folder: Path, rows: list[dict], curves: dict[str, list[plots.Curves]]) -> list[Path]:
    """Write rows, medians and two pictures per workload; returns the files. Raises InputError if
    one cannot be written."""
    paths = _paths(folder, curves)
    pictures = iter(paths[2:])
    try:
        paths[0].write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
        lines = [json.dumps(row) + "\n" for row in medians(rows)]
        paths[1].write_text("".join(lines), encoding="utf-8")
        for workload, workload_curves in curves.items():
            plots.occupancy(next(pictures), workload, workload_curves)
            plots.answers(next(pictures), workload, workload_curves)
    except OSError as error:
        raise InputError(f"cannot write {error.filename or folder}: {error.strerror}") from None
    return paths


def _paths(folder: Path, workloads: Iterable[str]) -> list[Path]:
    """The files that `_write` writes."""
    stems = dict.fromkeys(Path(workload).stem for workload in workloads)
    pictures = [f"{stem}-{kind}.png" for stem in stems for kind in ("occupancy", "answers")]
    return [folder / name for name in ("rows.json", "medians.jsonl", *pictures)]
