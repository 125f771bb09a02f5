"""The measuring commands of `python -m bench`: each yields rows and prints them as a table."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench.cli import listing, own_forms
from bench.cli.listing import SelectedCases
from bench.cli.measurement import Measurement, Several
from bench.cost import attention as cost
from bench.cost import vision as vision_cost
from bench.formats.traffic import PERCENTILES, read_traffic
from bench.launch_sites import case_sites, decode_sites
from bench.measure import tune
from bench.measure.devices import DTYPES, MAIN_DTYPE, TIMED_DTYPES, parse_dtypes
from bench.measure.ops import check_case, time_case
from bench.measure.rows import ceiling
from bench.options import SECONDS, case_arguments, filter_arguments
from bench.rows import jsonl, show
from bench.studies import decode, engine, fold, fp8_kv, images, packing, replay, sched
from bench.studies.host import dispatch
from bench.studies.long import prefill_memory
from bench.suite import cases, numerics_cases, traffic_cases
from bench.suite.forms import select
from bench.suite.op import Case
from kernels.runtime.configs import gpu_of
from model.errors import InputError
from model.terminal import integer, real, track
from pacore_sched.answers.rounds import MAX_WIDTH
from pacore_sched.engine.compile_ahead import warm_up

TIME_BUDGET_S = 1.0  # per case


def checked_cases(options: argparse.Namespace, device: torch.device) -> SelectedCases:
    """The cases and dtypes that `numerics` checks, filtered and in order."""
    own_forms.add(options)
    return _filtered(options, numerics_cases(), DTYPES)


def timed_cases(options: argparse.Namespace, device: torch.device) -> SelectedCases:
    """The cases and dtypes that `ops` times, filtered and in order."""
    own_forms.add(options)
    if not options.shapes and (options.percentiles != PERCENTILES or options.width):
        raise InputError("--percentiles and --width are of --shapes TRACE")
    if options.shapes:
        traffic = read_traffic(options.shapes, options.percentiles, options.width)
        listed = traffic_cases(device.type, traffic.points)
    else:
        listed = cases(device.type, options.grid)
        if not any(options.shape in case.name for case in listed):  # a case of the grid by its name
            listed = cases(device.type, grid=True)
    return _filtered(options, listed, (MAIN_DTYPE[device.type],))


def list_checked(options: argparse.Namespace, device: torch.device) -> int:
    """Print what `numerics` would check."""
    return listing.run(options, device, "numerics", checked_cases(options, device))


def list_timed(options: argparse.Namespace, device: torch.device) -> int:
    """Print what `ops` would time."""
    return listing.run(options, device, "ops", timed_cases(options, device))


def _filtered(
    options: argparse.Namespace, cases: Sequence[Case], default: Sequence[torch.dtype]
) -> SelectedCases:
    cases = select(cases, options.op, options.shape, options.impl)
    return [(case, dtype) for dtype in parse_dtypes(options.dtype) or default for case in cases]


def numerics(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Errors of every op's forms on awkward shapes in every dtype."""
    selected = checked_cases(options, device)
    warm_up(case_sites(selected, options.impl), device)
    for case, dtype in track(selected, "numerics"):
        yield from _reproducible(check_case(case, device, dtype, options.impl), options)


def ops(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Errors and times of every op's forms and peers on the model's shapes."""
    selected = timed_cases(options, device)
    warm_up(case_sites(selected, options.impl), device)
    for case, dtype in track(selected, "ops"):
        rows = time_case(case, device, dtype, options.impl, options.budget)
        yield from _reproducible(rows, options)


def _reproducible(rows: Sequence[dict], options: argparse.Namespace) -> Iterator[dict]:
    """The rows with the options that select their cases and forms, if they need any."""
    for row in rows:
        needed = listing.needed(options, row["impl"])
        yield row | {"options": needed} if needed else row


def decode_steps(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Errors and times of decode steps, their time by part, and prompts."""
    config = decode.selected_config(options, device)
    steps = decode.selected_steps(options, device)
    dtypes = decode.selected_dtypes(options, device)
    sites = [site for dtype in dtypes for site in decode_sites(config, steps, dtype)]
    warm_up(sites, device)
    yield from decode.run(options, device)


def ceilings(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """The device's measured roofline in each dtype that is timed on it."""
    for dtype in track(TIMED_DTYPES[device.type], "roofline"):
        yield ceiling(device, dtype)


def end_to_end(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """A question and a photo through whole models, or images of several sizes: eager and ours."""
    if options.vision:
        if options.impl:
            raise InputError("--vision measures eager and default: it takes no --impl")
        yield from images.run(device)
        return
    from bench.studies import e2e  # needs the packages of the README, which a GPU node may lack

    yield from e2e.run(device, options.impl)


def tuning(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Measure the candidate kernel configs and write the best ones into the GPU's table."""
    if not options.dry_run and device.type != "cuda":
        raise InputError("tune needs a GPU, this device is a CPU; --dry-run lists the candidates")
    tune.check_compiles()
    gpu = gpu_of(device)
    tuning_sets = tune.tuning_sets(
        select(cases("cuda"), options.op, options.shape), MAIN_DTYPE["cuda"], gpu
    )
    if options.dry_run:
        yield from map(tune.listed, tuning_sets)
        return
    for tuning_set in track(tuning_sets, "tune"):
        measured = tune.tune(tuning_set, device, MAIN_DTYPE["cuda"])
        best = tune.choose(measured)
        if best:
            tune.write(gpu, tuning_set.key, best)
        if not options.out:
            jsonl.append(tune.results(gpu), measured)
        yield from measured


def costs(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Bytes, items, balance and floors of prefix attention or vision ops on `--gpu`, computed on
    any machine."""
    if set(options.op) - {"prefix_attention"}:
        if set(options.op) - set(vision_cost.OPS):
            known = f"prefix_attention, or any of {', '.join(vision_cost.OPS)}"
            raise InputError(f"cost models only {known}")
        yield from vision_cost.table(options.op, options.gpu, options.copy_gb_s, options.shape)
        return
    yield from cost.table(options.gpu, options.copy_gb_s, options.shape)


def check_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `numerics`: the filters, and listing instead of measuring."""
    filter_arguments(parser)
    own_forms.add_argument(parser)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="list the cases without measuring")
    instead.add_argument(
        "--repro", action="store_true", help="print the command of each row without measuring"
    )


def time_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ops`."""
    check_arguments(parser)
    shapes = parser.add_mutually_exclusive_group()
    shapes.add_argument(
        "--grid", action="store_true", help="also prefix attention over prefixes x suffixes"
    )
    shapes.add_argument(
        "--shapes",
        type=Path,
        metavar="TRACE",
        help="instead the shapes of your traffic: percentiles of the requests in a JSONL or CSV"
        " trace (Mooncake, Azure, BurstGPT, OpenAI usage)",
    )
    parser.add_argument(
        "--percentiles",
        nargs="+",
        type=real(0, 100, exclusive=True),
        default=PERCENTILES,
        metavar="P",
        help=f"of --shapes (default: {' '.join(map(str, PERCENTILES))})",
    )
    parser.add_argument(
        "--width",
        type=integer(1, MAX_WIDTH),
        metavar="N",
        help="rollouts of every prompt of --shapes (default: those in the trace)",
    )
    parser.add_argument(
        "--budget",
        type=SECONDS,
        default=TIME_BUDGET_S,
        metavar="SECONDS",
        help=f"timing budget per case (default: {TIME_BUDGET_S:g})",
    )


def end_to_end_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vision", action="store_true", help="instead encode images of several sizes"
    )
    decode.impl_argument(parser)


def tune_arguments(parser: argparse.ArgumentParser) -> None:
    case_arguments(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="list input classes and candidates only"
    )


def cost_arguments(parser: argparse.ArgumentParser) -> None:
    case_arguments(parser)
    parser.add_argument("--gpu", choices=cost.GPUS, default="h200", help="default: h200")
    parser.add_argument(
        "--copy-gb-s",
        type=real(1e-3, 1e6),
        metavar="X",
        help="use this measured copy bandwidth instead of the data sheet's",
    )


OPS_TIMED = Measurement(ops, show.times, time_arguments, list_timed)
NUMERICS = Measurement(numerics, show.errors, check_arguments, list_checked)
DECODE = Measurement(decode_steps, show.decode, decode.add_arguments)
E2E = Measurement(end_to_end, show.whole_runs, end_to_end_arguments)
ROOFLINE = Measurement(ceilings, show.ceilings)
SCHED = Measurement(lambda options, device: sched.run(), show.scheduler)
ENGINE = Measurement(lambda options, device: engine.run(device), show.engine_steps)
PACKING = Measurement(lambda options, device: packing.run(device), show.packing)
REPLAY = Measurement(lambda options, device: replay.run(device), show.replay)
TUNE = Measurement(tuning, show.tuning, tune_arguments)
COST = Measurement(costs, show.costs, cost_arguments)
MEMORY = Measurement(prefill_memory.run, show.memory, prefill_memory.add_arguments)
DISPATCH = Measurement(lambda options, device: dispatch.run(device), show.dispatch)
FP8 = Measurement(lambda options, device: iter(fp8_kv.run(device)), show.fp8_kv)
FOLD = Measurement(lambda options, device: fold.run(device), show.fold)
ALL = Several(
    (NUMERICS, OPS_TIMED, DECODE, E2E),
    {
        **{"op": (), "shape": "", "impl": (), "dtype": (), "own_forms": ()},
        **{"shapes": None, "percentiles": PERCENTILES, "width": None},
        **{"model": None, "rope_scaling": None, "vision": False},
        **{"grid": True, "budget": TIME_BUDGET_S, "batch": (16,), "prefix": (), "suffix": ()},
        "prefill": (512,),
    },
)
