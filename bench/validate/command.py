"""`python -m bench validate`: compare every form of every op, and the tiny model, with fp64.

Ops are compared with fp64 formulas that share no code with them (fp64.py), on the irregular shapes
of `numerics` and on the same 16-bit inputs. The model is compared with its fp64 version and, in
fp32, with transformers and timm if they are installed. Errors are relative to max(rms(reference),
|reference|); the worst element of a result is shown in full. `--out` saves each row when it is
measured, and draws error histograms.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import torch

from bench.measure.devices import DTYPES, parse_device, parse_dtypes
from bench.measure.origin import origin
from bench.measure.verdicts import results
from bench.options import filter_arguments, output_arguments
from bench.rows import jsonl, show
from bench.suite import OPS, numerics_cases
from bench.suite.forms import form
from bench.suite.op import Case
from bench.validate import fp64, histogram
from bench.validate import model as validate_model
from bench.validate.comparison import compare_result, empty_fields, fields
from bench.validate.model import ModelCase, ModelSetup
from kernels.errors import ImplError, one_line
from kernels.runtime.dispatch import IMPLS, check_triton
from kernels.runtime.dtypes import dtype_name
from model.errors import InputError
from model.terminal import track
from pacore_sched.sim.plots import check_folder

ROWS = "validate.jsonl"
CPU = torch.device("cpu")
WRONG_BF16 = "Triton's interpreter multiplies bfloat16 wrongly; bfloat16 needs a GPU"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    filter_arguments(parser)
    output_arguments(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write rows and error histograms to DIR"
    )


def run(options: argparse.Namespace) -> int:
    """Validate the selected cases; return 1 if an error exceeds its limit, else 0."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = parse_device(options.device)
    if options.out:
        check_folder(options.out)
        jsonl.append(options.out / ROWS, [])  # fails now if it cannot be written
    new_rows = validate(
        device,
        ops=options.op,
        shape=options.shape,
        forms=options.impl,
        dtypes=parse_dtypes(options.dtype),
    )
    all_rows = []
    for row in new_rows:
        all_rows.append(row)
        if options.out:
            jsonl.append(options.out / ROWS, [row])
    pictures = histogram.draw(all_rows, options.out) if options.out else []
    if options.json:
        print(json.dumps({"rows": all_rows, "pictures": [str(path) for path in pictures]}))
    else:
        show.validation(all_rows)
        for path in pictures:
            print(f"picture: {path}")
    return int(any(row["failure"] for row in all_rows))


def validate(
    device: torch.device,
    *,
    ops: Sequence[str] = (),
    shape: str = "",
    forms: Sequence[str] = (),
    dtypes: Sequence[torch.dtype] = (),
) -> Iterator[dict]:
    """Yield a row for every form of each selected case and dtype; an empty filter selects all.

    Raises InputError for unknown names and if no case is selected, ImplError for a form that cannot
    run on `device`.
    """
    cases = select_cases(ops, shape, forms)
    interpreted = [name for name in forms if name.startswith("triton")] if device == CPU else []
    if interpreted:
        check_triton("any op", device)
        if torch.bfloat16 in dtypes:
            raise InputError(f"dtype 'bfloat16': {WRONG_BF16}; choose float16 or float32")
    setup = cache(partial(ModelSetup, device))
    pairs = [(case, dtype) for dtype in dtypes or DTYPES for case in cases]
    for case, dtype in track(pairs, "validate"):
        names = [name for name in forms or _default_forms(device) if _has(case, name)]
        wrong = [name for name in names if dtype == torch.bfloat16 and name in interpreted]
        names = [name for name in names if name not in wrong]
        verdicts = [(name, "fp64", empty_fields(skipped=WRONG_BF16)) for name in wrong]
        if names:
            if isinstance(case, ModelCase):
                verdicts += validate_model.verdicts(case, setup(dtype), names, libraries=not forms)
            else:
                verdicts += _verdicts(case, device, dtype, names, required=bool(forms))
        for name, reference, verdict in verdicts:
            yield _row(case, name, dtype, reference) | verdict | origin(device)


def select_cases(ops: Sequence[str], shape: str, forms: Sequence[str]) -> list[Case | ModelCase]:
    """The cases of `ops` with `shape` in their names that have one of `forms`; "model" is an op.

    Raises InputError for unknown names, listing the known ones, and if no case is selected.
    """
    cases: list[Case | ModelCase] = [*numerics_cases(), *validate_model.CASES]
    for kind, names, known in (
        ("op", ops, (*OPS, "model")),
        ("form", forms, (*IMPLS, *_modes())),
    ):
        for name in names:
            if name not in known:
                raise InputError(f"unknown {kind} {name!r}; choose one of {', '.join(known)}")
    op_cases = [case for case in cases if not ops or case.op in ops]
    selected = [case for case in op_cases if shape in case.name]
    if not selected:
        names = ", ".join(repr(case.name) for case in op_cases)
        raise InputError(f"no case has {shape!r} in its name; choose one of {names}")
    selected = [case for case in selected if not forms or any(_has(case, name) for name in forms)]
    if not selected:
        raise InputError(f"none of the selected cases has the form {' or '.join(forms)}")
    return selected


def _verdicts(
    case: Case, device: torch.device, dtype: torch.dtype, names: Sequence[str], required: bool
) -> Iterator[tuple[str, str, dict]]:
    """Yield form, reference and row fields; raise for forms that cannot run only if `required`."""
    inputs = case.inputs(0, device, dtype)
    expected = fp64.reference(case, inputs)
    for name in names:
        try:
            got = results(case, form(case.op, name), inputs)
            each = zip(_result_names(case.op)[: len(expected)], got, expected, strict=True)
            comparisons = [
                compare_result(*result, OPS[case.op].tolerance(result[1].dtype)) for result in each
            ]
            yield name, "fp64", fields(comparisons)
        except ImplError:
            if required:
                raise
        except Exception as error:  # a broken form must not hide the others
            yield name, "fp64", empty_fields(failure=one_line(error))


def _result_names(op: str) -> tuple[str, ...]:
    """The names of an op's results, in the order of `verdicts.results`."""
    return (*OPS[op].results, *(("k_pages", "v_pages") if OPS[op].stores else ()))


def _default_forms(device: torch.device) -> tuple[str, ...]:
    """All forms; on a CPU without Triton's, whose interpreter runs only if named."""
    return (*IMPLS, *_modes()) if device.type == "cuda" else IMPLS[:2]


def _modes() -> dict[str, None]:
    """The modes of all cases, in order."""
    return {mode: None for case in numerics_cases() for mode in case.modes}


def _has(case: Case | ModelCase, name: str) -> bool:
    return name in IMPLS or name in case.modes


def _row(case: Case | ModelCase, name: str, dtype: torch.dtype, reference: str) -> dict:
    return {
        "op": case.op,
        "case": case.name,
        "impl": name,
        "dtype": dtype_name(dtype),
        "reference": reference,
    }
