"""Tile choices: what a GPU offers, the committed tables in `tuned/`, and the rules without one.

Nothing is tuned when an op is called. `python -m bench tune` measures the candidates of an op on a
GPU and writes `tuned/<gpu>.json`; on a GPU without a table, or for a key that its table lacks, the
op's own rule decides from the GPU's SMs and shared memory.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

TABLES = Path(__file__).parents[1] / "tuned"
KernelConfig = dict[str, int]


@dataclass(frozen=True)
class Gpu:
    """What tile choices depend on."""

    name: str  # as in the names of the tables: "nvidia-h200"
    arch: int  # compute capability, 80 or 90
    sms: int
    shared_bytes: int  # that one program may use, at most

    @property
    def shared_bytes_sm(self) -> int:
        """Shared memory of an SM: the system keeps 1 KiB of it for each resident program."""
        return self.shared_bytes + 1024


A100 = Gpu("nvidia-a100", arch=80, sms=108, shared_bytes=163 * 1024)
H200 = Gpu("nvidia-h200", arch=90, sms=132, shared_bytes=227 * 1024)

_assumed: ContextVar[Gpu | None] = ContextVar("_assumed", default=None)
_asked: ContextVar[dict[tuple[str, str], KernelConfig] | None] = ContextVar("_asked", default=None)
_overrides: ContextVar[dict[str, KernelConfig]] = ContextVar("_overrides", default={})  # noqa: B039


def gpu_of(device: torch.device) -> Gpu:
    """The GPU that kernels on `device` are made for; the interpreter on a CPU plays an H200."""
    assumed = _assumed.get()
    if assumed or device.type != "cuda":
        return assumed or H200
    return _properties(torch.cuda.current_device() if device.index is None else device.index)


@dataclass(frozen=True, eq=False)
class Tunable:
    """The tile choices of an op, or of a part of one that has its own: made once, by its module.

    rule        of a GPU and what else `choose` is told of the inputs
    candidates  of a key and a GPU: what `python -m bench tune` measures
    """

    name: str
    rule: Callable[..., KernelConfig]
    candidates: Callable[[str, Gpu], list[KernelConfig]] = lambda key, gpu: []

    def __post_init__(self) -> None:
        TUNABLES[self.name] = self

    def choose(
        self, key: str, device: torch.device, *inputs: object, overridden: bool = True
    ) -> KernelConfig:
        """How to cut the work for inputs of class `key`: by the GPU's table, else by the rule.

        overridden: whether `use_config` has a say
        """
        gpu = gpu_of(device)
        chosen = table_of(gpu.name).get(self.name, {}).get(key)
        chosen = self.rule(gpu, *inputs) if chosen is None else chosen
        if overridden:
            chosen = chosen | _overrides.get().get(self.name, {})
        asked = _asked.get()
        if asked is not None:
            asked[self.name, key] = chosen
        return chosen


TUNABLES: dict[str, Tunable] = {}  # by name: all whose modules have been imported


@contextmanager
def record_configs() -> Iterator[dict[tuple[str, str], KernelConfig]]:
    """Collect what is chosen inside, by tunable and key: the keys that inputs fall into."""
    asked: dict[tuple[str, str], KernelConfig] = {}
    token = _asked.set(asked)
    try:
        yield asked
    finally:
        _asked.reset(token)


@contextmanager
def assume_gpu(gpu: Gpu) -> Iterator[None]:
    """Choose tiles as on `gpu`, whatever is present: for compilation ahead of time and plans."""
    token = _assumed.set(gpu)
    try:
        yield
    finally:
        _assumed.reset(token)


@contextmanager
def use_config(op: str, **chosen: int) -> Iterator[None]:
    """Put `chosen` over whatever is found for `op`: for tuning and for tests."""
    token = _overrides.set(_overrides.get() | {op: _overrides.get().get(op, {}) | chosen})
    try:
        yield
    finally:
        _overrides.reset(token)


@cache
def _properties(index: int) -> Gpu:
    found = torch.cuda.get_device_properties(index)
    return Gpu(
        name=found.name.lower().replace(" ", "-"),
        arch=10 * found.major + found.minor,
        sms=found.multi_processor_count,
        shared_bytes=found.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # no stub
    )


@cache
def table_of(gpu_name: str) -> dict[str, dict[str, KernelConfig]]:
    """{op: {key: tiles}} of a GPU; empty if it has no table."""
    path = TABLES / f"{gpu_name}.json"
    return json.loads(path.read_text()) if path.exists() else {}
