"""`python -m bench validate`: every form of every op, and the whole tiny model, against fp64.

Ops are judged by formulas in fp64 that share no code with them (fp64.py), on the awkward shapes of
`numerics` and on the same inputs in 16 bits; the model by its twin in fp64, and in fp32 by
transformers and timm where they are installed. Errors are relative to max(rms(reference),
|reference|); a result's worst element is shown in full. `--out` keeps the rows as they come, and
makes pictures of how errors spread.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import torch

from bench import jsonl, rows, show
from bench.cases import OPS, STORING, Case, numerics_cases
from bench.numerics import Error, form, results, roundoff, tolerance
from bench.ops import DTYPES, parse_device, parse_dtypes
from bench.options import filter_arguments, output_arguments
from bench.validate import fp64, histogram
from bench.validate import model as validate_model
from bench.validate.comparison import compared, fields, nothing
from bench.validate.model import ModelCase, Work
from kernels.errors import ImplError, one_line
from kernels.runtime.dispatch import IMPLS, check_triton
from kernels.runtime.dtypes import dtype_name
from model.errors import InputError
from model.terminal import track
from pacore_sched.sim.plots import check_folder

RETURNED = {
    "prefix_attention": ("out", "lse"),
    "qk_norm_rope": ("q",),
    "rms_norm": ("y", "total"),
    "layer_norm": ("y", "total"),
    "sample": ("tokens", "logprobs"),
}  # names of an op's results; of the others "out"
# TOLERANCES are measured against the eager form in fp32, so they leave out what is common to it and
# the others. For one op that is more than all the rest: torch's fp32 sum of 151,936 exponentials on
# a CPU puts the log-probability off by 50 roundoffs, 43 of RMS. Half as much again is allowed.
AGAINST_FP64 = {("sample", torch.float32): Error(75, 65)}
CPU = torch.device("cpu")
WRONG_BF16 = "Triton's interpreter multiplies bfloat16 wrongly: it needs a GPU"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    filter_arguments(parser)
    output_arguments(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="rows, and pictures of how errors spread"
    )


def run(options: argparse.Namespace) -> int:
    """Validate what the options choose; 1 if a result exceeds what it is allowed, else 0."""
    device = parse_device(options.device)
    if options.out:
        check_folder(options.out)
    work = validate(
        device,
        ops=options.op,
        shape=options.shape,
        forms=options.impl,
        dtypes=parse_dtypes(options.dtype),
    )
    made = []
    for row in work:
        made.append(row)
        if options.out:
            jsonl.append(options.out / "validate.jsonl", [row])
    pictures = histogram.draw(made, options.out) if options.out else []
    if options.json:
        print(json.dumps({"rows": made, "pictures": [str(path) for path in pictures]}))
    else:
        display(made)
        for path in pictures:
            print(f"picture: {path}")
    return int(any(row["failure"] for row in made))


def validate(
    device: torch.device,
    *,
    ops: Sequence[str] = (),
    shape: str = "",
    forms: Sequence[str] = (),
    dtypes: Sequence[torch.dtype] = (),
) -> Iterator[dict]:
    """A row for every form of every chosen case and dtype; all where nothing is chosen.

    Raises InputError for unknown names and where nothing is left, ImplError for a form that cannot
    run on `device`.
    """
    cases = chosen(ops, shape, forms)
    interpreted = [name for name in forms if name.startswith("triton")] if device == CPU else []
    if interpreted:
        check_triton("any op", device)
        if torch.bfloat16 in dtypes:
            raise InputError(f"dtype 'bfloat16': {WRONG_BF16}; choose float16 or float32")
    model = cache(partial(Work, device))
    pairs = [(case, dtype) for dtype in dtypes or DTYPES for case in cases]
    for case, dtype in track(pairs, "validate"):
        names = [name for name in forms or _forms(device) if _has(case, name)]
        wrong = [name for name in names if dtype == torch.bfloat16 and name in interpreted]
        names = [name for name in names if name not in wrong]
        found = [(name, "fp64", nothing(skipped=WRONG_BF16)) for name in wrong]
        if names and isinstance(case, ModelCase):
            found += validate_model.verdicts(case, model(dtype), names, libraries=not forms)
        elif names:
            found += _verdicts(case, device, dtype, names, required=bool(forms))
        for name, against, outcome in found:
            yield _row(case, name, dtype, against) | outcome | rows.origin(device)


def chosen(ops: Sequence[str], shape: str, forms: Sequence[str]) -> list[Case | ModelCase]:
    """The cases of `ops` that have `shape` in their names and one of `forms`; "model" is an op.

    Raises InputError for unknown names, listing the known ones, and if no case is left.
    """
    cases = [*numerics_cases(), *validate_model.CASES]
    for kind, names, known in (
        ("op", ops, (*OPS, "model")),
        ("form", forms, (*IMPLS, *_modes())),
    ):
        for name in names:
            if name not in known:
                raise InputError(f"unknown {kind} {name!r}; choose of {', '.join(known)}")
    of_ops = [case for case in cases if not ops or case.op in ops]
    left = [case for case in of_ops if shape in case.name]
    if not left:
        names = ", ".join(repr(case.name) for case in of_ops)
        raise InputError(f"no case has {shape!r} in its name; choose of {names}")
    left = [case for case in left if not forms or any(_has(case, name) for name in forms)]
    if not left:
        raise InputError(f"none of these cases has the form {', '.join(forms)}")
    return left


def display(made: Sequence[dict]) -> None:
    """For each op, form, dtype and reference its case with the largest error; all that failed."""
    header = ("op", "impl", "dtype", "against", " max error", " allowed", " RMS", " allowed")
    header += (" beyond 1 roundoff", "where it is worst", " got", " expected")
    groups: dict[tuple, list[dict]] = {}
    for row in made:
        if row["result"]:
            key = tuple(row[name] for name in ("op", "impl", "dtype", "reference"))
            groups.setdefault(key, []).append(row)
    lines = []
    for key, group in groups.items():
        worst = max(group, key=lambda row: math.inf if row["max_err"] is None else row["max_err"])
        numbers = (worst[name] for name in ("max_err", "max_allowed", "rms_err", "rms_allowed"))
        place = f"{worst['case']}: {worst['result']}{worst['worst_index']}"
        values = (repr(worst[name]) for name in ("worst_got", "worst_expected"))
        share = f"{100 * worst['beyond_roundoff']:.2g} %"
        lines.append([*key, *map(_error, numbers), share, place, *values])
    show.titled("errors relative to max(rms(reference), |reference|)", made, header, lines)
    for row in made:
        if row["failure"]:
            name = ", ".join(row[field] for field in ("op", "case", "impl", "dtype", "reference"))
            print(f"FAILED: {name}: {row['failure']}")
    for impl, reason in {(row["impl"], row["skipped"]): None for row in made if row["skipped"]}:
        cases = {row["case"] for row in made if (row["impl"], row["skipped"]) == (impl, reason)}
        print(f"skipped: {reason} ({impl}: {len(cases)} {'case' if len(cases) == 1 else 'cases'})")


def _verdicts(
    case: Case, device: torch.device, dtype: torch.dtype, names: Sequence[str], required: bool
) -> Iterator[tuple[str, str, dict]]:
    """Form, reference and fields; forms that this machine cannot run only if `required`."""
    inputs = case.inputs(0, device, dtype)
    expected = fp64.reference(case, inputs)
    for name in names:
        try:
            found = results(case, form(case.op, name), inputs)
            each = zip(_names(case.op)[: len(expected)], found, expected, strict=True)
            made = [compared(*of_one, _allowed(case.op, of_one[1].dtype)) for of_one in each]
            yield name, "fp64", fields(made)
        except ImplError:
            if required:
                raise
        except Exception as error:  # a broken form must not hide the others
            yield name, "fp64", nothing(failure=one_line(error))


def _names(op: str) -> tuple[str, ...]:
    """What the results of an op are called, in the order of `numerics.results`."""
    return (*RETURNED.get(op, ("out",)), *(("k_pages", "v_pages") if op in STORING else ()))


def _allowed(op: str, dtype: torch.dtype) -> Error:
    limits = AGAINST_FP64.get((op, dtype))
    unit = roundoff(dtype) if limits else 0.0
    return Error(limits.max * unit, limits.rms * unit) if limits else tolerance(op, dtype)


def _forms(device: torch.device) -> tuple[str, ...]:
    """Not Triton's interpreter, unless it is asked for."""
    return (*IMPLS, *_modes()) if device.type == "cuda" else IMPLS[:2]


def _modes() -> dict[str, None]:
    """The modes that some case has, in order."""
    return {mode: None for case in numerics_cases() for mode in case.modes}


def _has(case: Case | ModelCase, name: str) -> bool:
    return name in IMPLS or name in case.modes


def _row(case: Case | ModelCase, name: str, dtype: torch.dtype, against: str) -> dict:
    return {
        "op": case.op,
        "case": case.name,
        "impl": name,
        "dtype": dtype_name(dtype),
        "reference": against,
    }


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
