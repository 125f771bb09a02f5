"""`python -m bench`: check the numbers of every op, time them, answer a question end to end.

`python -m bench tune` is for a new GPU: it measures tile choices and writes kernels/tuned/.
`python -m bench cost` needs none: what prefix attention moves, and how evenly it and the vision ops
fill a GPU, by arithmetic.
`python -m bench fp8` shows what FP8 KV pages do to a real model, `python -m bench fold` what
folding the projector's layers does to its numbers.
The engine: `bench sched` is what the scheduler costs per step, `bench engine` a whole step while
the batch is full, `bench packing` what packing many problems is worth, `bench replay` how far the
simulator is from the engine.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench import (
    cost,
    engine,
    fold,
    fp8_kv,
    images,
    packing,
    replay,
    rows,
    sched,
    show,
    tune,
    vision_cost,
)
from bench.cases import OPS, cases, numerics_cases
from bench.ops import DTYPES, MAIN_DTYPE, TIMED_DTYPES, check_case, device_named, select, time_case
from kernels._launch import IMPLS
from kernels._tiles import gpu_of
from model.terminal import InputError, Parser, run_command, track


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 1 if a form's numbers are wrong or it could not run, else 0."""
    options = _parser().parse_args(argv)
    device = device_named(options.device)
    found: list[dict] = []
    for command in ALL if options.command == "all" else (options.command,):
        run, display = COMMANDS[command]
        made = []
        for row in run(options, device):
            made.append(row)
            if options.out:
                rows.append(options.out, [row])
        if not options.json:
            display(made)
        found += made
    if options.json:
        print(json.dumps({"rows": found}))
    return int(any(row.get("failure") for row in found))


def run_numerics(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Errors of every op's forms on awkward shapes in every dtype."""
    chosen = select(numerics_cases(), options.op, options.case)
    pairs = [(case, dtype) for dtype in DTYPES for case in chosen]
    for case, dtype in track(pairs, "numerics"):
        yield from check_case(case, device, dtype, options.impl)


def run_ops(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Errors and times of every op's forms and peers on the model's shapes."""
    chosen = select(cases(device.type, grid=options.grid), options.op, options.case)
    for case in track(chosen, "ops"):
        yield from time_case(case, device, MAIN_DTYPE[device.type], options.impl)


def run_roofline(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """What the device can do at best, in the dtypes it is used with."""
    for dtype in track(TIMED_DTYPES[device.type], "roofline"):
        yield rows.ceiling(device, dtype)


def run_end_to_end(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """A question and a photo through whole models, or images of several sizes; eager and ours."""
    if options.vision:
        yield from images.run(device)
        return
    from bench import e2e  # needs the packages of the README, which a GPU node may lack

    yield from e2e.run(device)


def run_tune(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Measure the tile candidates and write the best into the GPU's table."""
    if not options.dry_run and device.type != "cuda":
        raise InputError("tune measures on a GPU and this is none; --dry-run lists the candidates")
    tune.check_compiles()
    gpu = gpu_of(device)
    work = tune.plans(select(cases("cuda"), options.op, options.case), MAIN_DTYPE["cuda"], gpu)
    if options.dry_run:
        yield from map(tune.listed, work)
        return
    for plan in track(work, "tune"):
        made = tune.tune(plan, device, MAIN_DTYPE["cuda"])
        best = tune.choose(made)
        if best:
            tune.write(gpu, plan.key, best)
        if not options.out:
            rows.append(tune.results(gpu), made)
        yield from made


def run_cost(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Bytes, items, balance and floors on `--gpu`, wherever this runs: of prefix attention, or of
    vision ops."""
    if set(options.op) - {"prefix_attention"}:
        if set(options.op) - set(vision_cost.OPS):
            known = f"prefix_attention, or of {', '.join(vision_cost.OPS)}"
            raise InputError(f"cost has a model of {known}")
        yield from vision_cost.table(options.op, options.gpu, options.copy_gb_s, options.case)
        return
    yield from cost.table(options.gpu, options.copy_gb_s, options.case)


def display_cost(made: Sequence[dict]) -> None:
    """The rows of `run_cost` as tables."""
    (vision_cost if "padding" in made[0] else cost).display(made)


def run_fp8(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """What FP8 KV pages do to SmolLM2's distributions."""
    yield from fp8_kv.run(device)


def run_fold(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Errors and work of the projector with and without folded weights."""
    yield from fold.run(device)


def run_sched(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """What the scheduler costs per step."""
    yield from sched.run()


def run_engine(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Whole steps of the engine, its batch full."""
    yield from engine.run(device)


def run_packing(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """The same questions under several policies."""
    yield from packing.run(device)


def run_replay(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Pinned lengths through the engine and through the simulator."""
    yield from replay.run(device)


COMMANDS = {
    "roofline": (run_roofline, show.ceilings),
    "numerics": (run_numerics, show.errors),
    "ops": (run_ops, show.times),
    "e2e": (run_end_to_end, show.jobs),
    "tune": (run_tune, tune.display),
    "cost": (run_cost, display_cost),
    "fp8": (run_fp8, fp8_kv.display),
    "fold": (run_fold, fold.display),
    "sched": (run_sched, sched.display),
    "engine": (run_engine, engine.display),
    "packing": (run_packing, packing.display),
    "replay": (run_replay, replay.display),
}
ALL = ("numerics", "ops", "e2e")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m bench", description=__doc__)
    parser.add_argument("command", nargs="?", choices=("all", *COMMANDS), default="all")
    parser.add_argument("--op", nargs="+", default=(), metavar="OP", help=f"of {', '.join(OPS)}")
    parser.add_argument("--case", default="", metavar="TEXT", help="cases with TEXT in their name")
    parser.add_argument(
        "--impl", nargs="+", choices=IMPLS, default=(), help="these forms only (default: all)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument(
        "--grid", action="store_true", help="ops: all of prefix attention's grid (a GPU, long)"
    )
    parser.add_argument(
        "--vision", action="store_true", help="e2e: images of several sizes to embeddings instead"
    )
    parser.add_argument(
        "--gpu", choices=cost.GPUS, default="h200", help="cost: for which GPU (default: h200)"
    )
    parser.add_argument(
        "--copy-gb-s",
        type=float,
        metavar="X",
        help="cost: a measured copy bandwidth instead of the datasheet's",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="tune: list keys and candidates, measure nothing"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="add the rows to a JSONL file")
    parser.add_argument(
        "--json", action="store_true", help="no tables; end with one JSON document of all rows"
    )
    return parser


if __name__ == "__main__":
    run_command(main)
