"""The simulator: the engine's scheduler on a virtual clock that advances from event to event.

A GPU is a Scheduler and a SimExecutor, whose cost model gives the time of steps. Lengths are
pinned: a rollout has the same length in every run. Between events (a rollout ends, a page fills, a
problem arrives) only the lengths in a batch change, so the total time of all steps up to the next
event has a closed form, and skipping to the event gives the same result as single steps.
While the vision tower has images to encode, which slows steps, there are only single steps. Rounds
follow each other as in PaCoRe: when a group ends, its problem's next round is submitted, and the KV
of its image is kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, inf

from pacore_sched.answers.message_budget import prompt_limit
from pacore_sched.sched.policy import LaterRoundFirst
from pacore_sched.sched.request import Batch, Group, Rollout, Sampling, Segment
from pacore_sched.sched.scheduler import Scheduler
from pacore_sched.sim.cost_model import CostModel, steps_until
from pacore_sched.sim.executor import SimExecutor, step_shape
from pacore_sched.sim.vision.encoder import SimEncoder
from pacore_sched.sim.workload import MAX_TOKENS, Photo, SimProblem


@dataclass(slots=True)
class Record:
    """The times, in seconds, at which a rollout was submitted, had its first token, and ended."""

    problem: int
    round: int
    length: int  # pinned
    submitted_s: float
    first_s: float = inf
    ended_s: float = inf
    cancelled: bool = False


@dataclass(eq=False)
class Run:
    """A running problem: its image, which all rounds share, and its current round."""

    number: int
    problem: SimProblem
    image: Segment | None
    group: Group
    records: list[Record]  # of the round's rollouts, wherever they run


@dataclass(frozen=True)
class MovedRollouts:
    """Rollouts of a group on their way to another replica."""

    group: Group  # at the replica that they left
    records: dict[Rollout, Record]


class Replica:
    """One GPU with its scheduler and the problems that it runs.

    context: the most tokens of a prompt and its rollout; later rounds' messages are cut to it
    need_share: a round ends when this share of its rollouts have ended (1: all of them)
    on_round: called with the records of a round that has ended
    on_answer: called with a problem's number and the time at which its last round ended
    on_end: called with the record of a rollout that has ended here, at the clock of `executor`

    A problem's rounds are submitted at its home, the replica that took it. Its rollouts may move to
    other replicas, as guests: their groups there are submitted for them, and the home is told of
    their ends by `ended_elsewhere`.
    """

    def __init__(
        self,
        policy: LaterRoundFirst,
        cost: CostModel,
        num_pages: int,
        page_size: int,
        *,
        max_running: int,
        token_budget: int,
        max_tokens: int = MAX_TOKENS,
        context: int,
        need_share: float = 1.0,
        on_round: Callable[[list[Record]], None],
        on_answer: Callable[[int, float], None],
        on_end: Callable[[Record], None] = lambda record: None,
        encoder: SimEncoder | None = None,
    ) -> None:
        self.executor = SimExecutor(
            cost,
            num_pages=num_pages,
            page_size=page_size,
            max_running=max_running,
            encoder=encoder,
        )
        self.scheduler = Scheduler(
            num_pages, page_size, policy, max_running=max_running, token_budget=token_budget
        )
        self.sampling = Sampling(max_tokens, ignore_eos=True)
        self.context, self.need_share = context, need_share
        self.on_round, self.on_answer, self.on_end = on_round, on_answer, on_end
        self.runs: dict[int, Run] = {}  # problems whose home this is
        self.records: dict[Rollout, Record] = {}  # of the unfinished groups here
        self._batch, self._left = Batch(()), 0  # the last batch, and its remaining steps

    def length(self, rollout: Rollout) -> int:
        """The pinned length of an unfinished rollout."""
        return self.records[rollout].length

    def submit(self, number: int, problem: SimProblem) -> None:
        """Start a problem. Raises ValueError if one of its rollouts can never fit."""
        image = None
        if problem.image_tokens:
            image = self.executor.image(number, problem.image_tokens, problem.photos)
            self.scheduler.keep(image)
        self._submit_round(number, problem, image, 0, problem.prompt_tokens())

    def detach(self, problem: int, round: int, indices: Sequence[int]) -> MovedRollouts:
        """Remove unfinished rollouts, which go on at another replica."""
        run = self.runs.get(problem)
        records = {}
        for group in self._groups(problem, round):
            for rollout in [
                r for r in group.rollouts if r.index in indices and not r.finish_reason
            ]:
                records[rollout] = self.records.pop(rollout)
                self.scheduler.detach(rollout)
                if run is None or group is not run.group:  # only the home waits for them
                    self.scheduler.ended_elsewhere(group)
                    self._forget_if_done(group)
        return MovedRollouts(group, records)

    def accept(self, moved: MovedRollouts, photos: Sequence[Photo] = ()) -> None:
        """Let rollouts of a prompt with these images go on here.

        Leaves out those that have been cancelled on their way.
        """
        left = moved.group
        records = {old: record for old, record in moved.records.items() if not record.cancelled}
        if not records:
            return
        here = self._groups(left.problem, left.round)
        path = [*here[0].path] if here else [Segment(segment.tokens) for segment in left.path]
        if photos and not here:
            path[0] = self.executor.image(left.problem, path[0].tokens, photos)
        group = Group(path, 0, self.sampling, left.problem, left.round, need=len(records))
        for old, record in records.items():
            rollout = Rollout(group, old.index, 0, old.max_tokens)
            rollout.scheduled = old.scheduled
            group.rollouts.append(rollout)
            self.records[rollout] = record
        self.scheduler.submit(group)

    def ended_elsewhere(self, problem: int, round: int) -> None:
        """Count the end of a guest at the problem's home. Does nothing if the round is over."""
        run = self.runs.get(problem)
        if run and run.group.round == round:
            self.scheduler.ended_elsewhere(run.group)
            self._end_round(run)

    def cancel_guests(self, problem: int, round: int) -> None:
        """Cancel all rollouts of a round that has ended."""
        for group in self._groups(problem, round):
            self.scheduler.cancel(group)
            self._forget_if_done(group)

    def step(self, until: float = inf) -> bool:
        """Advance to the next event, or to the first step that ends at or after `until`.

        `until` is later than the clock if there is no step to run. Returns False if there is no
        work.
        """
        batch = self.scheduler.schedule()
        if batch is None:
            return self.executor.wait(self.scheduler.tree, until)
        if batch is not self._batch:
            self._batch, self._left = batch, batch.steps
        tree, clock = self.scheduler.tree, self.executor.clock
        shape = step_shape(tree, batch)
        steps = self._left
        if steps > 1:
            steps = min(steps, 1 + min(self.records[r].length - r.scheduled for r in batch.decode))
            until = min(until, self.executor.quiet_until)
            if until < inf:
                cost = self.executor.cost
                steps = steps_until(lambda k: cost.seconds(shape, k), until - clock, steps)
        sampled = batch.sampled
        started = [rollout for rollout in sampled if rollout.scheduled == 1]
        if steps > 1:
            self.scheduler.repeat(steps - 1)
        self._left -= steps
        self.executor.run(tree, batch, shape, steps)
        for rollout in started:
            one = clock + self.executor.cost.seconds(shape)
            self.records[rollout].first_s = one if steps > 1 else self.executor.clock
        for rollout in sampled:
            if not rollout.finish_reason and rollout.scheduled >= self.records[rollout].length:
                self._end(rollout)
        return True

    def _forget_if_done(self, group: Group) -> None:
        if group not in self.scheduler.groups:
            for rollout in group.rollouts:
                self.records.pop(rollout, None)

    def _groups(self, problem: int, round: int) -> list[Group]:
        """The unfinished groups of a round here."""
        groups = self.scheduler.groups
        return [group for group in groups if (group.problem, group.round) == (problem, round)]

    def _submit_round(
        self,
        number: int,
        problem: SimProblem,
        image: Segment | None,
        round: int,
        prompt_tokens: int,
    ) -> None:
        lengths = problem.lengths[round]
        path = [image] if image else []
        if prompt_tokens > 1:  # the last token is in the rollouts' leaves
            path.append(Segment(prompt_tokens - 1))
        exploring = round + 1 < len(problem.lengths)
        need = ceil(self.need_share * len(lengths)) if exploring else len(lengths)
        group = Group(path, 0, self.sampling, problem=number, round=round, need=need)
        limit = self.sampling.max_tokens
        if round:  # as in answers/problem_run.py; the context limits no lengths here
            limit = min(limit, self.scheduler.max_tokens(path))
        group.rollouts = [Rollout(group, index, 0, limit) for index in range(len(lengths))]
        clock = self.executor.clock
        records = [Record(number, round, min(length, limit), clock) for length in lengths]
        self.records |= zip(group.rollouts, records, strict=True)
        self.runs[number] = Run(number, problem, image, group, records)
        self.scheduler.submit(group)

    def _end(self, rollout: Rollout) -> None:
        """End a rollout, and its round and problem if they are complete."""
        group, record = rollout.group, self.records[rollout]
        self.scheduler.finish(rollout, "length")
        if not record.cancelled:
            record.ended_s = self.executor.clock
            self.on_end(record)
        run = self.runs.get(group.problem)
        if run and group is run.group:
            self._end_round(run)
        else:
            self._forget_if_done(group)
            self.ended_elsewhere(group.problem, group.round)

    def _end_round(self, run: Run) -> None:
        """End a problem's round if enough of its rollouts have ended; cancels the others."""
        group, problem, clock = run.group, run.problem, self.executor.clock
        if group.ended < group.need:
            return
        for record in run.records:
            if record.ended_s > clock:  # unfinished, or the news of its end has yet to come
                record.ended_s, record.cancelled = clock, True
        self._forget_if_done(group)
        self.cancel_guests(run.number, group.round)
        self.on_round(run.records)
        if group.round + 1 < len(problem.lengths):
            ended = [record.length for record in run.records if not record.cancelled]
            first = problem.image_tokens + problem.prompt_tokens()
            tree, max_tokens = self.scheduler.tree, self.sampling.max_tokens
            limit = prompt_limit(self.context, tree, first, max_tokens)
            prompt_tokens = problem.prompt_tokens(ended, limit)
            self._submit_round(run.number, problem, run.image, group.round + 1, prompt_tokens)
            return
        if run.image:
            self.scheduler.drop(run.image)
        del self.runs[run.number]
        self.on_answer(run.number, max(record.ended_s for record in run.records))
