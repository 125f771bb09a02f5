"""Old and new forms of an op side by side: tile choices that a GPU has yet to decide on.

A switch is a tile choice with an old and a new value. All forms of a case are timed in turns in
one run: the op as its rule has it, and with each switch at each of its two values while all other
choices stay as they are. So a pair differs in its switch alone.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from bench.cases import Case, cases
from bench.ops import NOT_RUN, time_case
from bench.rows import measured
from bench.tune import asked_tiles
from kernels._tiles import Tiles, gpu_of

Switches = dict[str, tuple[int, int]]  # tile choice -> its old and its new value

ATTENTION: Switches = {
    "ahead": (0, 1),  # the next block's page in a register
    "steady": (0, 1),  # no masks for whole blocks
    "pieces": (0, 1),  # the schedule writes a record per piece
    "split": (0, 1),  # the smaller tiles in a launch of their own
    "pdl": (0, 1),  # the kernel starts while the one before it ends
}
# Of each kind of device, what is compared on which cases of `bench ops`. Decode attention at 16
# and at 64 rollouts over very different numbers of bytes, so that a line can be laid through them.
PAIRS: dict[str, dict[tuple[str, str], Switches]] = {
    "cuda": {
        ("prefix_attention", "B16 P2048 S512"): ATTENTION,
        ("prefix_attention", "B64 P2048 S8192"): ATTENTION,
        ("prefix_attention", "B16 P32768 S2048"): ATTENTION,
        ("prefix_attention", "B64 P512 S128"): ATTENTION,
        ("prefix_attention", "B16 P2048 S128"): ATTENTION,
        ("prefix_attention", "B16 P2048 S512 fp8"): {"fp16": (0, 1)},  # products in fp16
        ("vision_attention", "8x 36x36 + 1x 52x52 H16 D96"): {"turn_q": (0, 1)},  # Q in the kernel
        ("rms_norm", "T16 C4096"): {"pdl": (0, 1)},
    },
    "cpu": {  # tiles mean nothing there: the way of a row is the same
        ("prefix_attention", "4 x (B4 P512 S64)"): {"ahead": (0, 1)},
        ("rms_norm", "T256 C4096"): {"pdl": (0, 1)},
    },
}
HOPPER = ("pdl",)  # switches that need sm_90


def pairs(device_type: str) -> list[tuple[Case, tuple[str, ...]]]:
    """The cases of a kind of device with the forms to time, as in "triton", "triton ahead=0"."""
    by_name = {(case.op, case.name): case for case in cases(device_type)}
    impl = "triton" if device_type == "cuda" else "portable"
    return [
        (by_name[key], (impl, *(f"{impl} {n}={v}" for n, values in of.items() for v in values)))
        for key, of in PAIRS[device_type].items()
    ]


def time_pairs(
    case: Case, device: torch.device, dtype: torch.dtype, names: Sequence[str], budget_s: float
) -> list[dict]:
    """Rows of the forms `names` of a case, as `time_case` makes them, wrong ones timed as well.

    Each has its `tiles` and its `pair`: "rule", or the switch and its value, as in "ahead 1". A
    form whose switch does not exist here is skipped. Raises as `time_case`.
    """
    tiles = chosen_tiles(case, device, dtype)
    reasons = {name: reason for name in names if (reason := _missing(name, tiles, device))}
    there = [name for name in names if name not in reasons]
    made = time_case(case, device, dtype, there, budget_s, anyway=True) if there else []
    made += [_skipped(case, name, device, dtype, reason) for name, reason in reasons.items()]
    return [row | _of_pair(row["impl"], tiles) for row in made]


def chosen_tiles(case: Case, device: torch.device, dtype: torch.dtype) -> Tiles | None:
    """The tile choices of a case on a GPU; None where none are made."""
    if device.type != "cuda":
        return None
    asked = asked_tiles(case, dtype, gpu_of(device))
    return next((tiles for (op, _), tiles in asked.items() if op == case.op), {})


def _missing(name: str, tiles: Tiles | None, device: torch.device) -> str | None:
    """Why a form cannot be had."""
    switch = name.partition(" ")[2].partition("=")[0]
    if not switch or tiles is None:
        return None
    if switch not in tiles:
        return f"the case has no tile choice {switch}"
    if switch in HOPPER and gpu_of(device).arch < 90:
        return f"{switch} needs sm_90"
    return None


def _of_pair(name: str, tiles: Tiles | None) -> dict:
    switch, _, value = name.partition(" ")[2].partition("=")
    if not switch:
        return {"tiles": tiles, "pair": "rule"}
    return {"tiles": (tiles or {}) | {switch: int(value)}, "pair": f"{switch} {value}"}


def _skipped(case: Case, name: str, device: torch.device, dtype: torch.dtype, reason: str) -> dict:
    row = measured(
        case.op,
        case.name,
        name,
        device=device,
        dtype=dtype,
        num_bytes=case.bytes(dtype),
        flops=case.flops,
        verdict=replace(NOT_RUN, skipped=reason),
    )
    return row | {"skipped": reason}
