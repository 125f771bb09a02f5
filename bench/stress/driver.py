"""Random engines and random events on them; `checks.py` says what must hold after each.

A run is one engine of random size and policy, with too little memory for what it is given. Its
events are what an application can do: submit, step, cancel, keep, drop, and images that become
ready or fail. In the end everything is drained.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from random import Random

from bench.stress.config import Config, RandomPolicy
from bench.stress.hash_executor import HashExecutor, expect
from bench.stress.hash_model import PLACEHOLDER, STOP_STRINGS, STOPPING, TEXTS, Expected, expected
from kernels.runtime.arithmetic import cdiv
from model.errors import InputError
from pacore_sched.engine.engine import Engine
from pacore_sched.engine.step_rows import Prompt
from pacore_sched.sched.policy import (
    ORACLES,
    POLICIES,
    Barrier,
    Fcfs,
    LaterRoundFirst,
)
from pacore_sched.sched.request import Group, Rollout, Sampling, Segment

MAX_LIVE = 8  # groups at the same time
WEIGHTS = {"step": 70, "submit": 20, "ready": 4, "cancel": 1, "fail": 1, "keep": 2, "drop": 3}


@dataclass
class Features:
    """Image embeddings: ints that no prompt id equals. They become ready when a run says so."""

    values: list[int]
    state: str = "encoding"  # then "ready" or "failed"

    @property
    def count(self) -> int:
        return len(self.values)

    @property
    def contents(self) -> list[int]:
        return self.values

    def ready(self) -> bool:
        return self.state == "ready"

    def result(self, start: int = 0, stop: int | None = None) -> list[int]:
        expect(self.ready(), "embeddings are read before they are ready")
        return self.values


@dataclass
class Problem:
    """Segments that the problem's rounds share, with an unfinished image's embeddings."""

    number: int
    head: list[Segment]
    features: Features
    rounds: int = 0


@dataclass(eq=False)
class Live:
    """A group that is not done, and what its rollouts must become."""

    group: Group
    expected: dict[Rollout, Expected]
    cancelled: bool = False


class Run:
    """One engine and all that happens to it."""

    def __init__(self, seed: int, number: int) -> None:
        self.draw = draw = Random(f"{seed}/{number}")
        self.config = config = Config.of(draw)
        self.executor = HashExecutor(
            config.model,
            num_pages=config.num_pages,
            page_size=config.page_size,
            max_running=config.max_running,
            budget=config.token_budget,
        )
        self.engine = Engine(
            self.executor,
            STOPPING,
            policy=self._policy(config.policy),
            token_budget=config.token_budget,
            ahead=config.ahead,
            speculate=config.speculate,
            host_pages=config.host_pages,
            prefix_cache=config.prefix_cache,
        )
        self.live: dict[Group, Live] = {}
        self.kept: list[Segment] = []  # one entry per `keep`
        self.problems: list[Problem] = []
        self.encoding: list[Features] = []
        self.texts: list[list[int]] = [[]]  # prompt ids, which others begin with
        self.images: list[int] = []  # embeddings, which come again
        self.idle_steps = 0  # in a row, although a group could have gone on
        self.happened: Counter[str] = Counter()
        self._problems = 0

    def events(self, number: int) -> Iterator[str]:
        """Names of random events, then of those that drain the engine; `perform` each at once."""
        load = self.draw.choice((0.2, 1, 1, 2))
        weights = [weight * (load if name == "submit" else 1) for name, weight in WEIGHTS.items()]
        yield from self.draw.choices([*WEIGHTS], weights, k=number)
        while self.encoding:
            yield "ready"
        left = 100 + 20 * sum(self._work(live) for live in self.live.values())
        while self.engine.busy:
            yield "step"
            left -= 1
            expect(left, "the engine does not come to an end")
        while self.kept:
            yield "drop"

    def perform(self, name: str) -> None:
        """Perform a random event of that name. Raises Fault, or what the engine raises."""
        self.happened[name] += 1
        getattr(self, f"_{name}")()

    def is_ready(self, live: Live) -> bool:
        """Whether a group could go on: none of its segments waits for images."""
        segment = next((s for s in live.group.path if s.written < s.tokens), None)
        return segment is None or segment.ready()

    def _policy(self, name: str) -> LaterRoundFirst:
        if name in ORACLES:
            return ORACLES[name](lambda rollout: len(self._expected_of(rollout).tokens) or 1)
        if name == "random":
            return RandomPolicy(self.draw)
        if name == "barrier":
            return Barrier(2)
        return POLICIES[name]()

    def _work(self, live: Live) -> int:
        return live.group.prompt_tokens + sum(rollout.max_tokens for rollout in live.expected)

    # Events

    def _step(self) -> None:
        before = self.executor.counts["rows"]
        next_group = self._starts_now()
        progress = next_group and _progress(next_group)
        ended = self.engine.step()
        expect(next_group is None or _progress(next_group) != progress, "a group starts too late")
        for rollout in ended:
            self._end(rollout)
        could = [live for live in self._may_start() if self.is_ready(live)]
        moved = ended or self.executor.counts["rows"] > before
        self.idle_steps = 0 if moved or not could else self.idle_steps + 1

    def _submit(self) -> None:
        if len(self.live) == MAX_LIVE:
            return
        draw = self.draw
        path, problem = self._path()
        stop = draw.choice(STOP_STRINGS)
        longest = draw.choice((1, 3, 10, 20, 30, 40, 50))
        sampling = Sampling(longest, stop=stop, ignore_eos=draw.random() < 0.5)
        width = draw.choice((1, 2, 3, 4, 6, 10))
        seeds = {index: draw.getrandbits(63) for index in range(width)}
        lengths = {i: draw.randint(1, longest) for i in seeds if draw.random() < 0.2}
        need = draw.randint(1, width) if draw.random() < 0.4 else None
        size, pool = self.config.page_size, self.config.num_pages
        longest = max(lengths.get(index, longest) for index in seeds)
        pages = sum(cdiv(segment.tokens, size) for segment in path) + cdiv(longest, size)
        submit = partial(self.engine.submit, path, draw.randrange(1, len(TEXTS)), seeds, sampling)
        try:
            group = submit(problem=problem.number, round=problem.rounds, need=need, lengths=lengths)
        except InputError:
            expect(pages > pool, "a group that fits was refused")
            self.happened["refused"] += 1
            return
        expect(pages <= pool, "a group that can never fit was taken")
        self.live[group] = Live(group, {r: self._expected_of(r) for r in group.rollouts})
        problem.rounds += 1

    def _cancel(self) -> None:
        if self.live:
            self._cancel_group(self.draw.choice([*self.live.values()]))

    def _ready(self) -> None:
        if self.encoding:
            features = self.encoding.pop(self.draw.randrange(len(self.encoding)))
            features.state = "ready"

    def _fail(self) -> None:
        """An image cannot be encoded: the groups that need it are cancelled."""
        if self.encoding:
            features = self.encoding.pop(self.draw.randrange(len(self.encoding)))
            features.state = "failed"
            self.problems = [p for p in self.problems if p.features is not features]
            for live in [*self.live.values()]:
                if any(_prompt(s).features is features for s in live.group.path):
                    self._cancel_group(live)

    def _keep(self) -> None:
        """Keep a part of a running group's prompt, from its beginning."""
        if self.live:
            path = self.draw.choice([*self.live]).path
            for segment in path[: self.draw.randint(0, len(path))]:
                self._keep_segment(segment)

    def _drop(self) -> None:
        if self.kept:
            segment = self.kept.pop(self.draw.randrange(len(self.kept)))
            self.engine.scheduler.drop(segment)
            if not segment.users:
                self.problems = [p for p in self.problems if segment not in p.head]

    # Parts of events

    def _path(self) -> tuple[list[Segment], Problem]:
        """A prompt: below a problem's images, or a part of the prompt of a group that runs."""
        draw = self.draw
        if not self.problems or draw.random() < 0.4:
            self.problems.append(self._problem())
        problem = draw.choice(self.problems)
        path = [*problem.head]
        shared = [group.path for group in self.live if group.problem == problem.number]
        if shared and draw.random() < 0.5:
            other = draw.choice(shared)
            path = [*other[: draw.choice((len(other), draw.randint(0, len(other))))]]
        if any(not segment.users for segment in path):  # dropped: it may not be used again
            path = []
        for _ in range(draw.choice((0, 0, 1, 1, 2))):
            path.append(self._segment(problem.features))
        return path, problem

    def _problem(self) -> Problem:
        draw = self.draw
        if not self.images or draw.random() < 0.5:
            self.images = [draw.randrange(1000, 1 << 40) for _ in range(12)]
        features = Features(draw.choice(([], self.images)))
        if features.values:
            self.encoding.append(features)
        head = [self._segment(features) for _ in range(draw.choice((0, 1, 1, 2)))]
        for segment in head:
            self._keep_segment(segment)
        self._problems += 1
        return Problem(self._problems, head, features)

    def _segment(self, features: Features) -> Segment:
        draw = self.draw
        ids = [draw.randrange(len(TEXTS)) for _ in range(draw.choice((0, 1, 3, 4, 8, 12)))]
        if draw.random() < 0.6:
            before = draw.choice(self.texts)
            ids = [*before[: draw.randint(0, len(before))], *ids][:24]
        self.texts = [*self.texts[-20:], [*ids]]
        first = draw.randint(0, features.count)
        for _ in range(features.count - first):
            if ids and draw.random() < 0.5:
                ids[draw.randrange(len(ids))] = PLACEHOLDER
        prompt = Prompt.of(ids, PLACEHOLDER + 1, PLACEHOLDER, features, first)
        ready = features.ready if prompt.placeholders else lambda: True
        return Segment(len(ids), prompt, ready, prompt.content, draw.choice(("", "", "other")))

    def _keep_segment(self, segment: Segment) -> None:
        self.engine.scheduler.keep(segment)
        self.kept.append(segment)

    def _may_start(self) -> list[Live]:
        """The groups that the policy does not hold back."""
        policy, lives = self.engine.scheduler.policy, [*self.live.values()]
        if not isinstance(policy, Barrier):
            return lives
        stages = [(live.group.problem // policy.size, live.group.round) for live in lives]
        return [live for live, stage in zip(lives, stages, strict=True) if stage == min(stages)]

    def _starts_now(self) -> Group | None:
        """The first of the groups that could go on, if all that it needs is there."""
        scheduler, config = self.engine.scheduler, self.config
        lives = [live for live in self.live.values() if live.group.waiting and self.is_ready(live)]
        if not lives or type(scheduler.policy) not in (LaterRoundFirst, Fcfs):
            return None
        group = min((live.group for live in lives), key=scheduler.policy.key)
        tree, running = scheduler.tree, scheduler.running
        if any(tree.length(rollout.node) < rollout.scheduled for rollout in running):
            return None  # the token budget is for those that catch up
        pages = cdiv(1 + group.waiting[0].scheduled, config.page_size)
        pages += sum(cdiv(s.tokens, config.page_size) for s in group.path if s.node < 0)
        found = [s for s in group.path if s.node >= 0]
        pages += sum(tree.pages_needed(s.node, s.tokens - s.written) for s in found)
        pages += len(running)  # each of those that run takes one at most
        watermark = scheduler.policy.watermark * config.num_pages if running else 0
        room = len(running) < config.max_running and len(running) < config.token_budget
        return group if room and pages + watermark <= tree.free_pages else None

    def _cancel_group(self, live: Live) -> None:
        live.cancelled = True
        for rollout in self.engine.cancel(live.group):
            self._end(rollout)
        expect(live.group not in self.live, "a cancelled group goes on")

    def _end(self, rollout: Rollout) -> None:
        """Check an ended rollout, and its group if that is done."""
        live = self.live.get(rollout.group)
        expect(live and rollout in live.expected, "a rollout has ended twice")
        assert live is not None
        want, reason = live.expected.pop(rollout), rollout.finish_reason
        count = len(rollout.tokens)
        expect(rollout.tokens == want.tokens[:count], "wrong tokens")
        expect(rollout.logprobs == want.logprobs[:count], "wrong log-probabilities")
        if reason == "cancelled":
            expect(count < len(want.tokens) + (want.reason == "error"), "an end was missed")
        else:
            expect(reason == want.reason and count == len(want.tokens), f"wrong end: {reason}")
            expect(self.engine.text(rollout) == want.text, "wrong text")
        self.happened[f"ended: {reason}"] += 1
        if not live.expected:
            del self.live[rollout.group]
            self._done(live)

    def _done(self, live: Live) -> None:
        group = live.group
        ended = sum(rollout.finish_reason != "cancelled" for rollout in group.rollouts)
        if live.cancelled:
            expect(ended < group.need, "a group went on after it was done")
        else:
            expect(ended == group.need, "a group did not end with the rollouts that it needs")

    def _expected_of(self, rollout: Rollout) -> Expected:
        group = rollout.group
        known = self.live.get(group)
        if known and rollout in known.expected:
            return known.expected[rollout]
        prompt: list[int] = []
        for segment in group.path:
            part = _prompt(segment)
            ids = [*part.ids]
            for i, position in enumerate(part.placeholders):
                assert isinstance(part.features, Features)
                ids[position] = part.features.values[part.first + i]
            prompt += ids
        prompt.append(group.last_token)
        return expected(self.config.model, prompt, rollout.seed, rollout.max_tokens, group.sampling)


def _prompt(segment: Segment) -> Prompt:
    """The ids and images of a segment that a group uses."""
    assert isinstance(segment.inputs, Prompt)
    return segment.inputs


def _progress(group: Group) -> tuple[int, int]:
    """What changes when a group's prompt is written or a rollout starts."""
    return sum(segment.written for segment in group.path), len(group.waiting)
