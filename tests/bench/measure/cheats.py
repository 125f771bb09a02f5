"""Forms of rms_norm that are fast because they do not do the work, and the failure of each."""

from threading import Event, Thread

import torch

from bench.measure.audit import KEPT
from kernels.norm import rms_norm


def right(inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return rms_norm(**inputs, impl="eager")


def by_pointer(inputs):
    """Results kept by the addresses of the inputs."""
    kept = {}

    def call():
        key = inputs["x"].data_ptr()
        if key not in kept:
            kept[key] = right(inputs)
        return tuple(x.clone() for x in kept[key])

    return call


def by_call(inputs):
    """The first call's results, in the memory that it returned."""
    kept = []

    def call():
        kept[:] = kept or [right(inputs)]
        return kept[0]

    return call


def thread(inputs):
    """The work is left to another thread; checks see it finished."""
    calls = {"count": 0}

    def call():
        calls["count"] += 1
        if calls["count"] == 1:
            return right(inputs)
        results = tuple(torch.full_like(inputs["x"], torch.nan) for _ in range(2))
        x = inputs | {"x": inputs["x"].clone()}

        @torch.inference_mode()
        def work():
            WAITING.wait(10)
            for result, value in zip(results, right(x), strict=True):
                result.copy_(value)

        Thread(target=work).start()
        return results

    return call


WAITING = Event()  # the audit waits for late results


def half(inputs):
    """The second half of the results is written by the first call only."""
    calls = {"count": 0}

    def call():
        calls["count"] += 1
        y, total = right(inputs)
        out = torch.empty_like(y)
        rows = len(y) if calls["count"] == 1 else len(y) // 2
        out[:rows] = y[:rows]
        return out, total

    return call


def recycled(inputs):
    """As `half`, but the memory that it gets still holds the results of the call before, as an
    allocator's may: simulated, unless the memory is filled with NaN."""
    calls = {"count": 0}

    def call():
        calls["count"] += 1
        y, total = right(inputs)
        out = torch.empty_like(y)
        recycles = calls["count"] == 1 or not out.isnan().all()
        rows = len(y) if recycles else len(y) // 2
        out[:rows] = y[:rows]
        return out, total

    return call


def unwritten(inputs):
    """The last row is never written."""

    def call():
        y, total = right(inputs)
        out = torch.empty_like(y)
        out[:-1] = y[:-1]
        return out, total

    return call


def in_place(inputs):
    """The results are written over the inputs."""

    def call():
        y, total = right(inputs)
        return inputs["x"].copy_(y), inputs["residual"].copy_(total)

    return call


def later_in_place(inputs):
    """The same, but not while results are checked."""
    calls = {"count": 0}

    def call():
        calls["count"] += 1
        y, total = right(inputs)
        return (y, total) if calls["count"] == 1 else (y, inputs["weight"].expand_as(total))

    return call


def changing(inputs):
    """Zeros are left in an input, for faster calls after this one."""

    def call():
        results = right(inputs)
        inputs["residual"].zero_()
        return results

    return call


def by_version(inputs):
    """Results kept until torch counts a write to the input."""
    kept = {}

    def call():
        key = inputs["x"]._version
        if key not in kept:
            kept[key] = right(inputs)
        return tuple(x.clone() for x in kept[key])

    return call


PREPARED = {"count": 0}


def one_set(inputs):
    """Only the judge's inputs and those of one set are worked on."""
    PREPARED["count"] += 1
    honest = PREPARED["count"] <= 2
    kept = []

    def call():
        if honest or not kept:
            kept[:] = right(inputs)
        return tuple(kept)

    return call


class Lazy(torch.Tensor):
    """Computes its values when somebody looks at them."""


def lazy(inputs):
    """A result that is no plain tensor."""
    return lambda: tuple(x.as_subclass(Lazy) for x in right(inputs))


def flagged(inputs):
    """The work is done while unwritten memory is filled with NaN, that is, while it is checked."""
    kept = []

    def call():
        if torch.are_deterministic_algorithms_enabled() or not kept:
            kept[:] = right(inputs)
        return tuple(x.clone() for x in kept)

    return call


def halved(inputs):
    """Half of the bytes are written, and the tolerance is a wider one."""
    return lambda: tuple(x.bfloat16() for x in right(inputs))


def weights(inputs):
    """The weights are changed, but not while results are checked."""
    calls = {"count": 0}

    def call():
        calls["count"] += 1
        results = right(inputs)
        if calls["count"] > 1:
            inputs["weight"] += 1
        return results

    return call


CHEATS = {
    by_pointer: KEPT,
    by_call: "does not do its work while it is timed: 320 of 320 elements are NaN",
    by_version: KEPT,
    one_set: "does not do its work while it is timed: 320 of 320",
    flagged: KEPT,
    thread: "arrive after the call has returned: work on another stream or thread",
    half: "(results differ|not do its work) while it is timed",  # memory may be old or NaN
    recycled: "not do its work while it is timed: 192 of 320 elements are NaN",
    unwritten: "^64 of 320 elements are NaN: not written",
    lazy: "y is a Lazy, not a plain tensor",
    halved: "y is torch.bfloat16, expected torch.float32",
    in_place: "^a result shares memory with the input 'x'$",
    later_in_place: "shares memory with the input 'weight' while it is timed",
    changing: "^it changes its input 'residual'$",
    weights: "changes its input 'weight' while it is timed",
}
