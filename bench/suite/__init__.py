"""The ops, one file each: inputs, cases with bytes and FLOPs, tolerances, an fp64 judge, peers.

A file that defines `OP` is an op of the benchmarks; nothing else lists it.
"""

from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module
from itertools import product
from pathlib import Path
from pkgutil import iter_modules

from bench.formats.traffic import Point
from bench.inputs.presets import BIG, SMOLLM2
from bench.peers.peer import Peer
from bench.suite.op import Case, Op


def _found() -> list[Op]:
    modules = iter_modules([str(Path(__file__).parent)])
    names = sorted({module.name for module in modules} - {"op", "forms"})
    return [import_module(f"bench.suite.{name}").OP for name in names]


OPS: dict[str, Op] = {op.name: op for op in sorted(_found(), key=lambda op: op.rank)}
PEERS: dict[str, dict[str, Peer]] = {  # by op, then by name
    op.name: {peer.name: peer for peer in op.peers} for op in OPS.values()
}


def cases(device_type: str, grid: bool = False) -> list[Case]:
    """The op table's cases on a "cuda" or "cpu" device: by op, the most informative first.

    With `grid`, the grids of ops that have one follow.
    """
    listed = [case for op in OPS.values() for case in op.cases(device_type)]
    if grid:
        listed += [case for op in OPS.values() for case in op.grid(device_type)]
    return _with_peers(device_type, listed)


def numerics_cases() -> list[Case]:
    """Irregular shapes: one row, primes, partly filled tiles, ragged trees, empty nodes."""
    return [case for op in OPS.values() for case in op.checks()]


def compiled_cases() -> list[Case]:
    """What is compiled ahead for GPUs: the op table's cases, and shapes that it lacks."""
    return [*cases("cuda"), *(case for op in OPS.values() for case in op.compiled())]


def traffic_cases(device_type: str, points: Iterable[Point]) -> list[Case]:
    """The cases of a user's traffic: each point's decode step and prefill, in the published model
    on a GPU, in SmolLM2 on a CPU."""
    model = SMOLLM2 if device_type == "cpu" else BIG
    listed = [case for op, at in product(OPS.values(), points) for case in op.of_traffic(at, model)]
    by_name = {(case.op, case.name): case for case in listed}  # points may have the same batch
    return _with_peers(device_type, by_name.values())


def in_modes(cases: Iterable[Case]) -> list[Case]:
    """Each case in every mode of the op's Triton form, to compile or tune all its kernels."""
    return [replace(case, form=form) for case in cases for form in ("triton", *case.modes)]


def _with_peers(device_type: str, cases: Iterable[Case]) -> list[Case]:
    return [replace(case, peers=peers_on(device_type, case.op)) for case in cases]


def peers_on(device_type: str, op: str) -> tuple[str, ...]:
    """The op's peers that are timed on a type of device by default."""
    return tuple(n for n, peer in PEERS[op].items() if peer.on_cpu or device_type != "cpu")
