"""The commands of `python -m bench` that measure: each yields rows and shows them as a table."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from bench import (
    cost,
    decode,
    engine,
    fold,
    fp8_kv,
    images,
    jsonl,
    packing,
    replay,
    rows,
    sched,
    show,
    tune,
    vision_cost,
)
from bench.cases import OPS, Case, cases, numerics_cases
from bench.launch_sites import case_sites, decode_sites
from bench.ops import (
    DTYPES,
    FORMS,
    MAIN_DTYPE,
    TIMED_DTYPES,
    check_case,
    dtypes_named,
    select,
    time_case,
)
from kernels.runtime.tiles import gpu_of
from model.config import PRESETS
from model.errors import InputError
from model.terminal import track
from pacore_sched.engine.compile_ahead import warm_up

TIME_BUDGET_S = 1.0  # per case


class Command(NamedTuple):
    """`run` yields rows on a device, `display` prints them, `arguments` adds options of its own."""

    help: str
    run: Callable[[argparse.Namespace, torch.device], Iterator[dict]]
    display: Callable[[Sequence[dict]], None]
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None


def chosen_cases(
    command: str, options: argparse.Namespace, device: torch.device
) -> list[tuple[Case, torch.dtype]]:
    """What `numerics` or `ops` works on, given its filters, in order."""
    if command == "numerics":
        found, default = numerics_cases(), DTYPES
    else:
        found, default = cases(device.type, options.grid), (MAIN_DTYPE[device.type],)
    found = select(found, options.op, options.shape, options.impl)
    return [(case, dtype) for dtype in dtypes_named(options.dtype) or default for case in found]


def numerics(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Errors of every op's forms on awkward shapes in every dtype."""
    chosen = chosen_cases("numerics", options, device)
    warm_up(case_sites(chosen, options.impl), device)
    for case, dtype in track(chosen, "numerics"):
        yield from check_case(case, device, dtype, options.impl)


def ops(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Errors and times of every op's forms and peers on the model's shapes."""
    chosen = chosen_cases("ops", options, device)
    warm_up(case_sites(chosen, options.impl), device)
    for case, dtype in track(chosen, "ops"):
        yield from time_case(case, device, dtype, options.impl, options.budget)


def decode_steps(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Errors and times of decode steps, and what they are made of."""
    name, dtypes, chosen = decode.chosen(options, device)
    sites = [site for dtype in dtypes for site in decode_sites(PRESETS[name], chosen, dtype)]
    warm_up(sites, device)
    yield from decode.run(options, device)


def ceilings(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """What the device can do at best, in the dtypes it is used with."""
    for dtype in track(TIMED_DTYPES[device.type], "roofline"):
        yield rows.ceiling(device, dtype)


def end_to_end(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """A question and a photo through whole models, or images of several sizes; eager and ours."""
    if options.vision:
        yield from images.run(device)
        return
    from bench import e2e  # needs the packages of the README, which a GPU node may lack

    yield from e2e.run(device)


def tuning(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Measure the tile candidates and write the best into the GPU's table."""
    if not options.dry_run and device.type != "cuda":
        raise InputError("tune measures on a GPU and this is none; --dry-run lists the candidates")
    tune.check_compiles()
    gpu = gpu_of(device)
    work = tune.plans(select(cases("cuda"), options.op, options.shape), MAIN_DTYPE["cuda"], gpu)
    if options.dry_run:
        yield from map(tune.listed, work)
        return
    for plan in track(work, "tune"):
        made = tune.tune(plan, device, MAIN_DTYPE["cuda"])
        best = tune.choose(made)
        if best:
            tune.write(gpu, plan.key, best)
        if not options.out:
            jsonl.append(tune.results(gpu), made)
        yield from made


def costs(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Bytes, items, balance and floors on `--gpu`, wherever this runs: of prefix attention, or of
    vision ops."""
    if set(options.op) - {"prefix_attention"}:
        if set(options.op) - set(vision_cost.OPS):
            known = f"prefix_attention, or of {', '.join(vision_cost.OPS)}"
            raise InputError(f"cost has a model of {known}")
        yield from vision_cost.table(options.op, options.gpu, options.copy_gb_s, options.shape)
        return
    yield from cost.table(options.gpu, options.copy_gb_s, options.shape)


def display_costs(made: Sequence[dict]) -> None:
    """The rows of `costs` as tables."""
    (vision_cost if "padding" in made[0] else cost).display(made)


def case_arguments(parser: argparse.ArgumentParser) -> None:
    """Which cases: `--op` and `--shape`."""
    parser.add_argument("--op", nargs="+", default=(), metavar="OP", help=f"of {', '.join(OPS)}")
    parser.add_argument(
        "--shape", default="", metavar="TEXT", help="the case of this name, or all with TEXT in it"
    )


def filter_arguments(parser: argparse.ArgumentParser) -> None:
    """Which cases, in which forms and dtypes."""
    case_arguments(parser)
    parser.add_argument(
        "--impl",
        nargs="+",
        default=(),
        metavar="FORM",
        help=f"these forms, modes and peers only (default: all that run here): {', '.join(FORMS)}",
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=(),
        metavar="DTYPE",
        help="bfloat16, float16, float32 (default: numerics all, times fp32 on a CPU, bf16 else)",
    )


def check_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `numerics`: the filters, and what tells instead of measuring."""
    filter_arguments(parser)
    telling = parser.add_mutually_exclusive_group()
    telling.add_argument("--list", action="store_true", help="list the cases, measure nothing")
    telling.add_argument(
        "--repro", action="store_true", help="print the command of each row, measure nothing"
    )


def time_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `ops`."""
    check_arguments(parser)
    parser.add_argument(
        "--grid", action="store_true", help="prefix attention over prefixes x suffixes, too"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=TIME_BUDGET_S,
        metavar="SECONDS",
        help=f"of timing per case (default: {TIME_BUDGET_S:g})",
    )


def end_to_end_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vision", action="store_true", help="images of several sizes to embeddings instead"
    )


def tune_arguments(parser: argparse.ArgumentParser) -> None:
    case_arguments(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="list keys and candidates, measure nothing"
    )


def cost_arguments(parser: argparse.ArgumentParser) -> None:
    case_arguments(parser)
    parser.add_argument("--gpu", choices=cost.GPUS, default="h200", help="default: h200")
    parser.add_argument(
        "--copy-gb-s",
        type=float,
        metavar="X",
        help="a measured copy bandwidth instead of the datasheet's",
    )


COMMANDS = {
    "ops": Command(
        "errors and times of every op beside its peers", ops, show.times, time_arguments
    ),
    "numerics": Command(
        "errors of every op on awkward shapes in every dtype",
        numerics,
        show.errors,
        check_arguments,
    ),
    "decode": Command(
        "a decode step of a whole model by batch, prefix and suffix, and what it is made of",
        decode_steps,
        decode.display,
        decode.add_arguments,
    ),
    "e2e": Command(
        "a question and a photo through whole models",
        end_to_end,
        show.jobs,
        end_to_end_arguments,
    ),
    "roofline": Command("what this machine can do at best", ceilings, show.ceilings),
    "sched": Command(
        "what the scheduler costs per step", lambda options, device: sched.run(), sched.display
    ),
    "engine": Command(
        "whole steps of the engine while its batch is full",
        lambda options, device: engine.run(device),
        engine.display,
    ),
    "packing": Command(
        "what packing many problems is worth (minutes)",
        lambda options, device: packing.run(device),
        packing.display,
    ),
    "replay": Command(
        "how far the simulator is from the engine (minutes)",
        lambda options, device: replay.run(device),
        replay.display,
    ),
    "tune": Command(
        "measure tile choices on a GPU, write kernels/tuned/", tuning, tune.display, tune_arguments
    ),
    "cost": Command(
        "bytes, balance and floors by arithmetic, without a GPU",
        costs,
        display_costs,
        cost_arguments,
    ),
    "fp8": Command(
        "what FP8 KV pages do to a real model",
        lambda options, device: iter(fp8_kv.run(device)),
        fp8_kv.display,
    ),
    "fold": Command(
        "what folding the projector's layers does to its numbers",
        lambda options, device: fold.run(device),
        fold.display,
    ),
}
