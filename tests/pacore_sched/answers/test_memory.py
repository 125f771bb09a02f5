"""Memory over a long run: nothing of an answered problem stays, and images keep to their budget.

Python's cyclic collector is off: a loop of tensors hardly ever triggers its full collection.
"""

import gc
import itertools
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch

from model.errors import InputError
from model.step3vl import Step3VL
from model.vision.image import Views
from model.vision.pixels import View
from pacore_sched.answers import arrivals, live
from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.pacore import Pacore, engine_for
from pacore_sched.answers.problem_run import Problem
from pacore_sched.sched.request import Group, Rollout, Sampling


@pytest.fixture(scope="module")
def tiny() -> Step3VL:
    return Step3VL.from_preset("tiny", seed=1)


@pytest.fixture(autouse=True)
def no_cyclic_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@dataclass
class Watched:
    """Weak references to the embeddings of every image of an engine, and to all images' pixels.

    known: whether the images have digests, so that their embeddings may be kept
    """

    pacore: Pacore
    known: bool = False
    features: list[weakref.ref] = field(default_factory=list)
    pixels: list[weakref.ref] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        executor = self.pacore.engine.executor
        encode = executor.encode

        def watched(views: Sequence[Views], salt: str) -> object:
            features = encode(views, salt)
            self.features += map(weakref.ref, features.images)
            return features

        executor.encode = watched

    def problem(self, name: str, load: str = "", text: str = "?", images: int = 1) -> Problem:
        """A problem with images, of which the last cannot be read if `load` is "broken"."""

        def views() -> list[Views]:
            loaded = []
            for _ in range(images):
                number = next(self.numbers)  # several problems are loaded at a time
                pixels = torch.full((168, 168, 3), number, dtype=torch.uint8)
                self.pixels.append(weakref.ref(pixels))
                digest = str(number).encode() if self.known else b""
                loaded.append(Views(pixels, pixels.new_empty(0, 112, 112, 3), (), digest))
            if load == "broken":
                raise InputError("no image")
            return loaded

        parts = [{"type": "image"} for _ in range(images)]
        content = [*parts, {"type": "text", "text": text}]
        return Problem([{"role": "user", "content": content}], views if images else None, name)

    @property
    def live_features(self) -> int:
        return sum(ref() is not None for ref in self.features)

    @property
    def live_pixels(self) -> int:
        return sum(ref() is not None for ref in self.pixels)


def watched_on(
    tiny: Step3VL, widths: Sequence[int] = (2,), image_bytes: int | None = None, **options
) -> Watched:
    engine = engine_for(tiny, kv_tokens=4096, max_running=4, image_bytes=image_bytes)
    return Watched(Pacore(tiny, engine, widths, Sampling(3), **options))


def rollouts_and_groups() -> int:
    return sum(isinstance(thing, Rollout | Group) for thing in gc.get_objects())


@pytest.mark.parametrize(
    "problem, error",
    [
        ({}, None),
        ({"load": "broken"}, "no image"),
        ({"text": "x" * 9000}, "the prompt has"),  # longer than the context
        ({"text": "x" * 5000}, "KV pages of"),
        ({"images": 0}, None),
    ],
    ids=["answered", "image broken", "prompt too long", "too little memory", "text"],
)
def test_nothing_of_an_answered_problem_stays(tiny: Step3VL, problem: dict, error: str | None):
    """A cycle between a problem's objects, such as those of a group and its rollouts or of a failed
    load and its traceback, which keeps embeddings (25 MB per image in the 10B), pixels (55 MB) or
    token lists until Python's full collection."""
    watched = watched_on(tiny)
    before = rollouts_and_groups()
    problems = [watched.problem(str(number), **problem) for number in range(8)]
    for answer in watched.pacore.answers(problems):
        assert error in answer.error if error else answer.error is None
    watched.pacore.engine.executor.close()  # waits for an image that is being encoded
    assert watched.live_features == watched.live_pixels == 0
    assert rollouts_and_groups() - before <= 2 * 4, "more than the last batch"


def test_failed_encoding_and_cancelled_rollouts(tiny: Step3VL, monkeypatch: pytest.MonkeyPatch):
    """The traceback of a failed encoding keeps its pixels, or a group that ended early its images'
    embeddings."""
    watched = watched_on(tiny, [4], min_messages=1)
    encode = tiny.vision.forward

    def failing(views: Sequence[View], between: object) -> torch.Tensor:
        if int(views[0].pixels[0, 0, 0]) % 2:
            raise RuntimeError("out of memory")
        return encode(views, between)

    monkeypatch.setattr(tiny.vision, "forward", failing)
    problems = [watched.problem(str(i)) for i in range(8)]
    errors = [answer.error for answer in watched.pacore.answers(problems)]
    assert sum(error is not None and "out of memory" in error for error in errors) == 4
    assert errors.count(None) == 4
    assert watched.live_features == watched.live_pixels == 0


def test_a_run_that_stops_early(tiny: Step3VL):
    """What a callback raises ends the run: no image stays, and none is encoded in vain."""
    watched = watched_on(tiny)

    def stop(result: RolloutResult) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        [*watched.pacore.answers(map(watched.problem, "abcdef"), on_rollout=stop)]
    watched.pacore.engine.executor.close()
    assert watched.live_features == watched.live_pixels == 0


@pytest.mark.parametrize("known", [False, True])
def test_embeddings_keep_to_their_budget(tiny: Step3VL, known: bool):
    """Images encoded hundreds of problems ahead of use, or kept after it, outside the memory plan.
    Problems with images wait for room, in order; one that is larger than the budget runs alone."""
    rows = tiny.config.vision.image_tokens  # of an image of `Watched.problem`
    budget = 3 * rows * tiny.config.decoder.hidden * tiny.dtype.itemsize
    watched = watched_on(tiny, [1], image_bytes=budget)
    watched.known = known
    problems = [watched.problem(f"{i}", images=5 if i == 6 else i % 3) for i in range(12)]
    answered, held = [], []
    for answers in watched.pacore.steps(problems):
        assert all(answer.error is None for answer in answers)
        answered += [int(answer.problem) for answer in answers]
        held.append(sum(ref() is not None for ref in watched.features))
    assert sorted(answered) == [*range(12)]
    assert {*held} <= {0, 1, 2, 3, 5}
    assert {3, 5} <= {*held}


@pytest.mark.parametrize("text", ["?", "x" * 5000], ids=["admitted", "too little memory"])
def test_pixels_that_wait_for_the_encoder_are_bounded(
    tiny: Step3VL, monkeypatch: pytest.MonkeyPatch, text: str
):
    """Pixels of all admitted problems, or of those that have failed, in the encoder's queue: 55 MB
    for each image of the 10B."""
    watched, gate, budget = watched_on(tiny, [1]), threading.Event(), 3
    for module in (live, arrivals):
        monkeypatch.setattr(module, "PIXEL_BYTES", budget * 3 * 168 * 168)
    encode = tiny.vision.forward

    def slow(views: Sequence[torch.Tensor], between: object) -> torch.Tensor:
        gate.wait()
        return encode(views, between)

    monkeypatch.setattr(tiny.vision, "forward", slow)
    problems = [watched.problem("first"), *(watched.problem(str(i), text=text) for i in range(16))]
    limit = budget + arrivals.PREPARED_AHEAD  # how large these are is not known before
    most = answered = steps = 0
    for number, answers in enumerate(watched.pacore.steps(problems)):
        most, answered = max(most, watched.live_pixels), answered + len(answers)
        steps += most >= 2 * budget or answered == 16  # all that can happen before the gate opens
        if steps == 30 or number == 10_000:
            gate.set()
    assert answered == 17
    assert most <= limit
    assert most >= 2 * budget or text != "?"
