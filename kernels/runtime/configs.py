"""Choice of kernel configs: from the GPU's tuned table, else by the op's rule.

Nothing is tuned when an op is called. `python -m bench tune` measures an op's candidates on a GPU
and writes `tuned/<gpu>.json`. On a GPU without a table, or for a key that its table lacks, the op's
rule chooses from the GPU's SMs and shared memory.
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
    """The properties of a GPU on which kernel configs depend."""

    name: str  # as in the tables' file names: "nvidia-h200"
    arch: int  # compute capability, 80 or 90
    sms: int
    shared_bytes: int  # the most shared memory that one CTA may use

    @property
    def shared_bytes_sm(self) -> int:
        """Shared memory of an SM, of which the system reserves 1 KiB for each resident CTA."""
        return self.shared_bytes + 1024


A100 = Gpu("nvidia-a100", arch=80, sms=108, shared_bytes=163 * 1024)
H200 = Gpu("nvidia-h200", arch=90, sms=132, shared_bytes=227 * 1024)

_assumed: ContextVar[Gpu | None] = ContextVar("_assumed", default=None)
_recorded: ContextVar[dict[tuple[str, str], KernelConfig] | None] = ContextVar(
    "_recorded", default=None
)
_overrides: ContextVar[dict[str, KernelConfig]] = ContextVar("_overrides", default={})  # noqa: B039


def gpu_of(device: torch.device) -> Gpu:
    """The GPU to choose configs for: that of `device`, or an H200 for the interpreter on a CPU."""
    assumed = _assumed.get()
    if assumed or device.type != "cuda":
        return assumed or H200
    return _properties(torch.cuda.current_device() if device.index is None else device.index)


@dataclass(frozen=True, eq=False)
class Tunable:
    """The choice of kernel configs for an op, or for one kernel of it; created by its module.

    rule        the config without a table, from the GPU and the `inputs` given to `choose`
    candidates  the configs that `python -m bench tune` measures, from a key and a GPU
    """

    name: str
    rule: Callable[..., KernelConfig]
    candidates: Callable[[str, Gpu], list[KernelConfig]] = lambda key, gpu: []

    def __post_init__(self) -> None:
        TUNABLES[self.name] = self

    def choose(
        self, key: str, device: torch.device, *inputs: object, overridden: bool = True
    ) -> KernelConfig:
        """The config for input class `key`: from the GPU's table, else by the rule.

        overridden: whether `use_config` applies
        """
        gpu = gpu_of(device)
        config = table_of(gpu.name).get(self.name, {}).get(key)
        config = self.rule(gpu, *inputs) if config is None else config
        if overridden:
            config = config | _overrides.get().get(self.name, {})
        recorded = _recorded.get()
        if recorded is not None:
            recorded[self.name, key] = config
        return config


TUNABLES: dict[str, Tunable] = {}  # by name, those whose modules have been imported


@contextmanager
def record_configs() -> Iterator[dict[tuple[str, str], KernelConfig]]:
    """Collect every config that is chosen inside the block, by tunable and input class."""
    recorded: dict[tuple[str, str], KernelConfig] = {}
    token = _recorded.set(recorded)
    try:
        yield recorded
    finally:
        _recorded.reset(token)


@contextmanager
def assume_gpu(gpu: Gpu) -> Iterator[None]:
    """Choose configs as on `gpu`, even if it is absent: for ahead-of-time compilation."""
    token = _assumed.set(gpu)
    try:
        yield
    finally:
        _assumed.reset(token)


@contextmanager
def use_config(op: str, **overrides: int) -> Iterator[None]:
    """Override values of every config that is chosen for `op`: for tuning and tests."""
    token = _overrides.set(_overrides.get() | {op: _overrides.get().get(op, {}) | overrides})
    try:
        yield
    finally:
        _overrides.reset(token)


@cache
def _properties(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(
        name=properties.name.lower().replace(" ", "-"),
        arch=10 * properties.major + properties.minor,
        sms=properties.multi_processor_count,
        shared_bytes=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # no stub
    )


@cache
def table_of(gpu_name: str) -> dict[str, dict[str, KernelConfig]]:
    """A GPU's tuned table, {op: {key: config}}; empty if there is none."""
    path = TABLES / f"{gpu_name}.json"
    return json.loads(path.read_text()) if path.exists() else {}
