"""Old and new forms of an op side by side: tile choices that a GPU has yet to decide on.

A switch is a tile choice with an old and a new value. All forms of a case are timed in turns in
one run: the op as its rule has it, and with each switch at each of its two values while all other
choices stay as they are. So a pair differs in its switch alone. `checks` are small cases whose
numbers say whether a form is worth timing.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from bench.cases import Case, cases, numerics_cases
from bench.numerics import choices_of, form
from bench.ops import NOT_RUN, check_case, row_of, time_case
from bench.tune import requested_configs
from kernels.compile.launches import launches_recorded
from kernels.compile.unfilled import unfilled
from kernels.runtime.configs import Gpu, KernelConfig, gpu_of

Switches = dict[str, tuple[int, int]]  # tile choice -> its old and its new value
Table = dict[tuple[str, str], Switches]  # by op and name of a case

ATTENTION: Switches = {
    "ahead": (0, 1),  # the next block's page in a register
    "steady": (0, 1),  # no masks for whole blocks
    "pieces": (0, 1),  # the schedule writes a record per piece
    "split": (0, 1),  # the smaller tiles in a launch of their own
    "pdl": (0, 1),  # the kernel starts while the one before it ends
}
ONE_SIZE = {name: values for name, values in ATTENTION.items() if name != "split"}  # of tiles
FP16: Switches = {"fp16": (0, 1)}  # products of e4m3 in fp16
# What both forms of a switch have besides: with `ahead`, fp16 would spill on sm_90.
BESIDE = {"fp16": " ahead=0"}
TURN_Q: Switches = {"turn_q": (0, 1)}  # Q rotated in the kernel
PDL: Switches = {"pdl": (0, 1)}
# Of each kind of device, what is compared on which cases of `bench ops`. Decode attention at 16
# and at 64 rollouts over very different numbers of bytes, so that a line can be laid through them;
# then a thousand small nodes, for `split`, and whole blocks in sight of 128 vectors, for `steady`.
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
    "cpu": {  # tiles mean nothing there: the way of a row is the same
        ("prefix_attention", "4 x (B4 P512 S64)"): {"ahead": (0, 1)},
        ("rms_norm", "T256 C4096"): PDL,
    },
}
# The same of `numerics_cases`, in bf16. One value of each is the rule's and was checked as such,
# but which one that is depends on the GPU.
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
    """The cases of a kind of device with the forms to time, as in "triton", "triton ahead=0"."""
    found = _known(cases(device_type), PAIRS, device_type)
    return [
        (case, (impl, *(_named(impl, n, v) for n, values in switches.items() for v in values)))
        for case, impl, switches in found
    ]


def checks(device_type: str) -> list[tuple[Case, tuple[str, ...]]]:
    """Numerics cases with both forms of a switch, an entry for each switch."""
    return [
        (case, tuple(_named(impl, name, value) for value in values))
        for case, impl, switches in _known(numerics_cases(), CHECKS, device_type)
        for name, values in switches.items()
    ]


def _named(impl: str, switch: str, value: int) -> str:
    return f"{impl} {switch}={value}{BESIDE.get(switch, '')}"


def _known(
    known: Iterable[Case], tables: dict[str, Table], device_type: str
) -> Iterator[tuple[Case, str, Switches]]:
    by_name = {(case.op, case.name): case for case in known}
    impl = "triton" if device_type == "cuda" else "portable"
    for key, switches in tables[device_type].items():
        yield by_name[key], impl, switches


def time_pairs(
    case: Case, device: torch.device, dtype: torch.dtype, names: Sequence[str], budget_s: float
) -> list[dict]:
    """Rows of the forms `names` of a case, as `time_case` makes them, wrong ones timed as well.

    Each has its `tiles` and its `pair`: "rule", or the switch and its value, as in "ahead 1". A
    form that cannot be had here is skipped. Raises as `time_case`.
    """
    there, made = _there(case, device, dtype, names)
    if there:
        made = time_case(case, device, dtype, there, budget_s, anyway=True) + made
    tiles = chosen_config(case, device, dtype)
    return [row | _of_pair(row["impl"], tiles) for row in made]


def check_forms(
    case: Case, device: torch.device, dtype: torch.dtype, names: Sequence[str]
) -> list[dict]:
    """Rows of the forms `names` of a case, as `check_case` makes them; a form with a tile choice
    that cannot be had here is skipped. Raises as `check_case`."""
    there, made = _there(case, device, dtype, names)
    return (check_case(case, device, dtype, there) if there else []) + made


def chosen_config(case: Case, device: torch.device, dtype: torch.dtype) -> KernelConfig | None:
    """The tile choices of a case on a GPU; None where none are made."""
    if device.type != "cuda":
        return None
    asked = requested_configs(case, dtype, gpu_of(device))
    return next((tiles for (op, _), tiles in asked.items() if op == case.op), {})


def refusals(case: Case, dtype: torch.dtype, names: Sequence[str], gpu: Gpu) -> dict[str, str]:
    """Why forms with a tile choice cannot be had on `gpu`: the case makes no such choice, or the op
    refuses it beside its others. Nothing is launched."""
    known = {name for tiles in requested_configs(case, dtype, gpu).values() for name in tiles}
    with unfilled():
        inputs = case.inputs(0, torch.device("cpu"), dtype)
    found = {}
    for name in names:
        missing = choices_of(name.partition(" ")[2]).keys() - known
        if missing:
            found[name] = f"the case has no tile choice {', '.join(sorted(missing))}"
            continue
        try:
            with launches_recorded(gpu):
                form(case.op, name)(inputs)()
        except ValueError as error:
            found[name] = str(error)
        except Exception:  # broken here, broken when it runs: that tells
            continue
    return found


def _there(
    case: Case, device: torch.device, dtype: torch.dtype, names: Sequence[str]
) -> tuple[list[str], list[dict]]:
    """The forms that can be had, and rows of the others."""
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


def _of_pair(name: str, tiles: KernelConfig | None) -> dict:
    chosen = choices_of(name.partition(" ")[2])
    pair = next((f"{switch} {value}" for switch, value in chosen.items()), "rule")
    return {"tiles": tiles | chosen if tiles is not None else chosen or None, "pair": pair}
