"""The rows of one whole step: our forms and model peers, timed alternately in one run."""

from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol

from torch import Tensor

from bench.errors import Error, compare
from bench.measure.rows import measured, with_speedups
from bench.measure.timing import Timing, measure
from bench.measure.verdicts import NOT_RUN, Verdict
from bench.model_peers import fields
from bench.model_peers.peer import LoadedPeer, Work
from bench.peers.peer import Unavailable
from model.config import DecoderConfig
from model.step3vl import Step3VL


class StepCase(Protocol):
    """What a step does."""

    op: ClassVar[str]

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> dict[str, int]: ...

    def flops(self, config: DecoderConfig) -> int: ...


def begin(
    peers: Mapping[str, LoadedPeer], start: Callable[[LoadedPeer], Work]
) -> dict[str, Work | Unavailable]:
    """Each peer's work, or the reason why it cannot do it."""
    works: dict[str, Work | Unavailable] = {}
    for name, peer in peers.items():
        try:
            works[name] = start(peer)
        except Unavailable as reason:
            works[name] = reason
    return works


def time_step(
    case: StepCase,
    model: Step3VL,
    calls: Mapping[str, Callable[[], object]],
    errors: Mapping[str, Error],
    works: Mapping[str, Work | Unavailable],
    expected: Tensor,
    *,
    num_bytes: Callable[[str], int],
    budget_s: float,
    min_repeats: int | None = None,
) -> list[dict]:
    """A row for each of our forms in `calls`, whose errors are known, and for each peer.

    num_bytes: the least bytes that a form must move
    expected: the logits that those of peers are compared with
    min_repeats: as in `measure`
    """
    working = {name: work for name, work in works.items() if isinstance(work, Work)}
    errors = {**errors, **{n: compare(work.call(), expected) for n, work in working.items()}}
    calls = {**calls, **{name: work.call for name, work in working.items()}}
    timings = measure(
        {name: _candidate(call) for name, call in calls.items()},
        device=model.device,
        budget_s=budget_s,
        min_repeats=min_repeats,
    )

    def row(name: str, verdict: Verdict, timing: Timing | None) -> dict:
        return measured(
            case.op,
            f"{model.config.name} {case.name}",
            name,
            device=model.device,
            dtype=model.dtype,
            num_bytes=num_bytes(name),
            flops=case.flops(model.config.decoder),
            verdict=verdict,
            timing=timing,
            shape={"model": model.config.name, **case.shape},
        ) | _peer_fields(name, works.get(name))

    rows = [
        row(name, Verdict(errors[name].max, errors[name].rms, None), timings[name])
        for name in calls
    ]
    missing = [row(name, NOT_RUN, None) for name in works if name not in working]
    return with_speedups(rows) + missing


def _candidate(call: Callable[[], object]) -> Callable[[int], object]:
    """`call` for `measure`, which passes the index of a set of inputs: here there is one set."""
    return lambda _: call()


def _peer_fields(name: str, work: Work | Unavailable | None) -> dict:
    """The further fields of a peer's row; none for our forms."""
    if work is None:
        return {}
    if isinstance(work, Unavailable):
        return fields(name, "") | {"skipped": str(work)}
    return fields(name, work.settings)
