"""Pairs of an op's old and new forms, timed together: switches that need a GPU to decide.

A switch is a kernel config value with an old and a new form. All forms of a case are timed
alternately in one run: the op with the config that its rule chooses, and with each switch at both
values while everything else stays the same, so the forms of a pair differ in one switch only.
`checks` are small cases whose numbers say whether a form is worth timing.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from bench.measure.ops import check_case, row_of, time_case
from bench.measure.tune import requested_configs
from bench.measure.verdicts import NOT_RUN
from bench.suite import cases, numerics_cases
from bench.suite.forms import form, parse_config
from bench.suite.op import Case
from kernels.compile.launches import launches_recorded
from kernels.compile.unfilled import unfilled
from kernels.runtime.configs import Gpu, KernelConfig, gpu_of

Switches = dict[str, tuple[int, int]]  # switch -> its old and its new value
Table = dict[tuple[str, str], Switches]  # by op and name of a case

ATTENTION: Switches = {
    "ahead": (0, 1),  # the next block's page in a register
    "steady": (0, 1),  # no masks for fully visible blocks
    "pieces": (0, 1),  # the schedule writes a record per piece
    "split": (0, 1),  # a separate launch for the smaller row tiles
    "pdl": (0, 1),  # the kernel starts before its predecessor has ended
}
ONE_SIZE = {name: values for name, values in ATTENTION.items() if name != "split"}  # of row tiles
FP16: Switches = {"fp16": (0, 1)}  # products of e4m3 in fp16
# Config values that both forms of a switch have in addition: with `ahead`, fp16 spills on sm_90.
EXTRA_VALUES = {"fp16": " ahead=0"}
TURN_Q: Switches = {"turn_q": (0, 1)}  # Q rotated in the kernel
PDL: Switches = {"pdl": (0, 1)}
# The switches to compare, by device type and case of `bench ops`: decode attention with 16 and with
# 64 rollouts over very different numbers of bytes, to fit a line through them; then a thousand
# small nodes, for `split`, and blocks that 128 vectors see entirely, for `steady`.
PAIRS: dict[str, Table] = {
    "cuda": {
        ("prefix_attention", "B16 P2048 S512"): ATTENTION,
        ("prefix_attention", "B64 P2048 S8192"): ATTENTION,
        ("prefix_attention", "B16 P32768 S2048"): ATTENTION,
        ("prefix_attention", "B64 P512 S128"): ATTENTION,
        ("prefix_attention", "B16 P2048 S128"): ATTENTION,
        ("prefix_attention", "B16 P2048 S512 fp8"): FP16,
        ("prefix_attention", "1024 x (2048 + 32)"): {"split": (0, 1)},
        ("prefix_attention", "prefill 2048 behind 8192"): {"steady": (0, 1)},
        ("vision_attention", "8x 36x36 + 1x 52x52 H16 D96"): TURN_Q,
        ("rms_norm", "T16 C4096"): PDL,
    },
    "cpu": {  # configs have no effect there; rows take the same path
        ("prefix_attention", "4 x (B4 P512 S64)"): {"ahead": (0, 1)},
        ("rms_norm", "T256 C4096"): PDL,
    },
}
# The same for `numerics_cases`, in bf16. One value of each switch is the rule's and is checked by
# `numerics` already; which one depends on the GPU.
CHECKS: dict[str, Table] = {
    "cuda": {
        ("prefix_attention", "ragged forest"): ATTENTION,
        ("prefix_attention", "ragged forest window 70"): ATTENTION,
        ("prefix_attention", "ragged forest fp8"): ATTENTION | FP16,
        ("rotary_attention", "ragged decode"): ONE_SIZE,
        ("rotary_attention", "smollm2 ragged decode"): ATTENTION,
        ("vision_attention", "2x 5x7 + 1x 8x3 H2 D96"): TURN_Q,
        ("vision_attention", "1x 11x6 + 1x 2x1 H1 D128"): TURN_Q,
        ("rms_norm", "T7 C4096"): PDL,
        ("layer_norm", "T7 C1536"): PDL,
    },
    "cpu": {("rms_norm", "T7 C4096"): PDL},
}
CHECKED_DTYPE = torch.bfloat16


def pairs(device_type: str) -> list[tuple[Case, tuple[str, ...]]]:
    """The cases of a device type with the forms to time, such as "triton", "triton ahead=0"."""
    cases_with_switches = _switched_cases(cases(device_type), PAIRS, device_type)
    return [
        (case, (impl, *(_form_name(impl, n, v) for n, values in switches.items() for v in values)))
        for case, impl, switches in cases_with_switches
    ]


def checks(device_type: str) -> list[tuple[Case, tuple[str, ...]]]:
    """Numerics cases with both forms of a switch, one entry per switch."""
    return [
        (case, tuple(_form_name(impl, name, value) for value in values))
        for case, impl, switches in _switched_cases(numerics_cases(), CHECKS, device_type)
        for name, values in switches.items()
    ]


def _form_name(impl: str, switch: str, value: int) -> str:
    return f"{impl} {switch}={value}{EXTRA_VALUES.get(switch, '')}"


def _switched_cases(
    cases: Iterable[Case], tables: dict[str, Table], device_type: str
) -> Iterator[tuple[Case, str, Switches]]:
    by_name = {(case.op, case.name): case for case in cases}
    impl = "triton" if device_type == "cuda" else "portable"
    for key, switches in tables[device_type].items():
        yield by_name[key], impl, switches


def time_pairs(
    case: Case, device: torch.device, dtype: torch.dtype, names: Sequence[str], budget_s: float
) -> list[dict]:
    """Rows of a case's forms `names`, as from `time_case`; forms with wrong numbers are timed as
    well.

    Each row has its config as `tiles` and its `pair`: "rule", or the switch and its value, such as
    "ahead 1". A form that is unavailable here is skipped. Raises as `time_case` does.
    """
    available, rows = _available(case, device, dtype, names)
    if available:
        rows = time_case(case, device, dtype, available, budget_s, anyway=True) + rows
    config = chosen_config(case, device, dtype)
    return [row | _pair_fields(row["impl"], config) for row in rows]


def check_forms(
    case: Case, device: torch.device, dtype: torch.dtype, names: Sequence[str]
) -> list[dict]:
    """Rows of a case's forms `names`, as from `check_case`; a form with a config value that is
    unavailable here is skipped. Raises as `check_case` does."""
    available, skipped = _available(case, device, dtype, names)
    return (check_case(case, device, dtype, available) if available else []) + skipped


def chosen_config(case: Case, device: torch.device, dtype: torch.dtype) -> KernelConfig | None:
    """The kernel config that a case gets on a GPU; None on a CPU, which has none."""
    if device.type != "cuda":
        return None
    requested = requested_configs(case, dtype, gpu_of(device))
    return next((config for (op, _), config in requested.items() if op == case.op), {})


def refusals(case: Case, dtype: torch.dtype, names: Sequence[str], gpu: Gpu) -> dict[str, str]:
    """Why forms with config values are unavailable on `gpu`: the case has no such value, or the op
    refuses it together with its other values. Launches nothing."""
    known = {name for config in requested_configs(case, dtype, gpu).values() for name in config}
    with unfilled():
        inputs = case.inputs(0, torch.device("cpu"), dtype)
    reasons = {}
    for name in names:
        unknown = parse_config(name.partition(" ")[2]).keys() - known
        if unknown:
            reasons[name] = f"the case's kernel config has no {', '.join(sorted(unknown))}"
            continue
        try:
            with launches_recorded(gpu):
                form(case.op, name)(inputs)()
        except ValueError as error:
            reasons[name] = str(error)
        except Exception:  # it will fail in the same way when it runs, and be reported then
            continue
    return reasons


def _available(
    case: Case, device: torch.device, dtype: torch.dtype, names: Sequence[str]
) -> tuple[list[str], list[dict]]:
    """The available forms, and rows of the others."""
    reasons = _refused(case, device, dtype, [name for name in names if " " in name])
    skipped = [
        row_of(case, name, device, dtype, replace(NOT_RUN, skipped=reason))
        for name, reason in reasons.items()
    ]
    return [name for name in names if name not in reasons], skipped


def _refused(
    case: Case, device: torch.device, dtype: torch.dtype, names: Sequence[str]
) -> dict[str, str]:
    on_gpu = device.type == "cuda" and names
    return refusals(case, dtype, names, gpu_of(device)) if on_gpu else {}


def _pair_fields(name: str, config: KernelConfig | None) -> dict:
    override = parse_config(name.partition(" ")[2])
    pair = next((f"{switch} {value}" for switch, value in override.items()), "rule")
    return {"tiles": config | override if config is not None else override or None, "pair": pair}
