"""The commands of `python -m bench` that measure: each yields rows and shows them as a table."""

import argparse
from collections.abc import Iterator, Sequence

import torch

from bench import (
    cost,
    decode,
    engine,
    fold,
    fp8_kv,
    images,
    jsonl,
    listing,
    packing,
    replay,
    rows,
    sched,
    show,
    tune,
    vision_cost,
)
from bench.cases import Case, cases, numerics_cases
from bench.launch_sites import case_sites, decode_sites
from bench.listing import Chosen
from bench.measurement import Measurement, Several
from bench.ops import (
    DTYPES,
    MAIN_DTYPE,
    TIMED_DTYPES,
    check_case,
    parse_dtypes,
    select,
    time_case,
)
from bench.options import case_arguments, filter_arguments
from kernels.runtime.configs import gpu_of
from model.config import PRESETS
from model.errors import InputError
from model.terminal import track
from pacore_sched.engine.compile_ahead import warm_up

TIME_BUDGET_S = 1.0  # per case


def checked_cases(options: argparse.Namespace, device: torch.device) -> Chosen:
    """What `numerics` works on, given its filters, in order."""
    return _filtered(options, numerics_cases(), DTYPES)


def timed_cases(options: argparse.Namespace, device: torch.device) -> Chosen:
    """What `ops` works on, given its filters, in order."""
    return _filtered(options, cases(device.type, options.grid), (MAIN_DTYPE[device.type],))


def tell_checked(options: argparse.Namespace, device: torch.device) -> int:
    """What `numerics` would do."""
    return listing.run(options, device, "numerics", checked_cases(options, device))


def tell_timed(options: argparse.Namespace, device: torch.device) -> int:
    """What `ops` would do."""
    return listing.run(options, device, "ops", timed_cases(options, device))


def _filtered(
    options: argparse.Namespace, found: Sequence[Case], default: Sequence[torch.dtype]
) -> Chosen:
    found = select(found, options.op, options.shape, options.impl)
    return [(case, dtype) for dtype in parse_dtypes(options.dtype) or default for case in found]


def numerics(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Errors of every op's forms on awkward shapes in every dtype."""
    chosen = checked_cases(options, device)
    warm_up(case_sites(chosen, options.impl), device)
    for case, dtype in track(chosen, "numerics"):
        yield from check_case(case, device, dtype, options.impl)


def ops(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Errors and times of every op's forms and peers on the model's shapes."""
    chosen = timed_cases(options, device)
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
    work = tune.tuning_sets(
        select(cases("cuda"), options.op, options.shape), MAIN_DTYPE["cuda"], gpu
    )
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


OPS_TIMED = Measurement(ops, show.times, time_arguments, tell_timed)
NUMERICS = Measurement(numerics, show.errors, check_arguments, tell_checked)
DECODE = Measurement(decode_steps, decode.display, decode.add_arguments)
E2E = Measurement(end_to_end, show.jobs, end_to_end_arguments)
ROOFLINE = Measurement(ceilings, show.ceilings)
SCHED = Measurement(lambda options, device: sched.run(), sched.display)
ENGINE = Measurement(lambda options, device: engine.run(device), engine.display)
PACKING = Measurement(lambda options, device: packing.run(device), packing.display)
REPLAY = Measurement(lambda options, device: replay.run(device), replay.display)
TUNE = Measurement(tuning, tune.display, tune_arguments)
COST = Measurement(costs, display_costs, cost_arguments)
FP8 = Measurement(lambda options, device: iter(fp8_kv.run(device)), fp8_kv.display)
FOLD = Measurement(lambda options, device: fold.run(device), fold.display)
ALL = Several(
    (NUMERICS, OPS_TIMED, DECODE, E2E),
    {
        **{"op": (), "shape": "", "impl": (), "dtype": (), "model": None, "vision": False},
        **{"grid": True, "budget": TIME_BUDGET_S, "batch": (16,), "prefix": (), "suffix": ()},
    },
)
