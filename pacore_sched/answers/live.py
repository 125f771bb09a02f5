"""The problems that run on an engine: their rounds are submitted, and their rollouts recorded.

A problem's next round is submitted in the same step in which its current round ends, and the engine
batches it with all other work. A failed problem, for example one with a prompt that is too long or
a broken image, does not affect the others: whatever is raised for one problem, expected or not,
becomes the error in its answer. Errors of the engine's steps and of the callback are raised.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from model.errors import STOPS, reason
from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.problem_run import ProblemRun
from pacore_sched.answers.rounds import compact
from pacore_sched.engine.engine import Engine
from pacore_sched.engine.executor import ModelExecutor
from pacore_sched.sched.request import Group, Rollout

AHEAD = 1024  # unfinished rollouts submitted at a time, at least: policies choose among them
PIXEL_BYTES = 1 << 29  # pixels that wait to be encoded; those of one problem may be more

OnRollout = Callable[[ProblemRun, Rollout, RolloutResult], None]


@dataclass(frozen=True)
class Round:
    """The results of one round, ordered by index.

    cut, dropped: the previous round's rollouts whose messages have lost their beginnings, or are
    left out, so that the prompt fits (message_budget.py)
    """

    prompt_tokens: int
    rollouts: tuple[RolloutResult, ...]
    cut: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()

    @staticmethod
    def of(results: Sequence[RolloutResult]) -> "Round":
        """The round that these rollouts are."""
        first = results[0]
        return Round(first.prompt_tokens, tuple(results), first.cut, first.dropped)

    def record(self) -> dict:
        """The round in the JSON of `ask`, `batch` and `serve`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "cut": list(self.cut),
            "dropped": list(self.dropped),
            "rollouts": [
                {
                    "text": rollout.text,
                    "tokens": rollout.num_tokens,
                    "seed": rollout.seed,
                    "finish_reason": rollout.finish_reason,
                }
                for rollout in self.rollouts
            ],
        }


@dataclass(frozen=True)
class Answer:
    """The result of a problem. `text` is the message of the synthesis, "" without a synthesis.

    `error` says why there is no answer: either the problem failed in some round, and that round and
    those after it are missing from `rounds`, or all rollouts of the last round failed.
    """

    problem: str
    text: str
    error: str | None
    rounds: tuple[Round, ...]

    @staticmethod
    def of(run: ProblemRun, error: str | None) -> "Answer":
        """The answer of a problem that has ended."""
        rounds = tuple(map(Round.of, run.rounds))
        last = rounds[-1].rollouts if rounds else ()
        if error is None and all(result.finish_reason == "error" for result in last):
            error = "the last round failed: its logits were not finite"
        text = compact(last[0].text) if run.settings.synthesis and not error else ""
        return Answer(run.id, text, error, rounds)


class LiveProblems:
    """Problems that have started and not ended; `len` is their number."""

    def __init__(self, engine: Engine[ModelExecutor]) -> None:
        self.engine = engine
        self._runs: dict[Group, ProblemRun] = {}  # by the group of their current round

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def runs(self) -> Collection[ProblemRun]:
        """The problems in the order in which their current rounds began."""
        return self._runs.values()

    def has_room(self, run: ProblemRun) -> bool:
        """Whether there is room for a problem: for its rollouts and, if it has images, for their
        embeddings within the budget, which one problem alone may exceed, and for the pixels next to
        those that wait to be encoded.

        Problems start in the order of arrival: those after one without room wait with it.
        """
        if not self._runs:
            return True
        max_pending = max(AHEAD, 2 * self.engine.scheduler.max_running)
        if sum(other.pending for other in self.runs) >= max_pending:
            return False
        if not run.image_bytes:
            return True
        held = sum(other.image_bytes for other in self.runs)
        pixels = sum(other.pixel_bytes for other in self.runs)
        fits = not held or held + run.image_bytes <= self.engine.executor.image_bytes
        return fits and (not pixels or pixels + run.pixel_bytes <= PIXEL_BYTES)

    def start(self, run: ProblemRun) -> Answer | None:
        """Submit a problem's next round; returns its answer if no round is left or this fails."""
        try:
            group = run.next_round()
        except BaseException as error:  # panics of Rust code are no Exceptions
            run.release()
            if isinstance(error, STOPS):
                raise
            return Answer.of(run, reason(error))
        if group is not None:
            self._runs[group] = run
            return None
        run.release()
        return Answer.of(run, None)

    def step(self, on_rollout: OnRollout) -> list[tuple[ProblemRun, Answer]]:
        """Run one step of the engine; returns the problems that ended, with their answers.

        on_rollout: called for every rollout that ended or was cancelled
        """
        done = self._take(self.engine.step(), on_rollout)
        return self._next_rounds(done) + self._end_failed()

    def take_elsewhere(
        self, run: ProblemRun, result: RolloutResult, on_rollout: OnRollout
    ) -> list[tuple[ProblemRun, Answer]]:
        """As `step`, for the end of a rollout that has been detached (ProblemRun.detach) and that
        the problem awaits."""
        group = run.group
        assert group is not None
        self._take(run.take_elsewhere(result), on_rollout)
        return self._next_rounds([] if run.pending else [group])

    def cancel(self, run: ProblemRun) -> None:
        """End a problem without an answer; does nothing if it has ended or not started."""
        group = run.group
        if group is not None and group in self._runs:
            del self._runs[group]
            self.engine.cancel(group)
            run.release()

    def cancel_all(self) -> None:
        for run in list(self.runs):
            self.cancel(run)

    def _next_rounds(self, done: Iterable[Group]) -> list[tuple[ProblemRun, Answer]]:
        """Start the rounds after those of the groups `done`; returns the problems that end."""
        answers = []
        for group in done:
            run = self._runs.pop(group)
            if answer := self.start(run):
                answers.append((run, answer))
        return answers

    def _take(self, ended: Iterable[Rollout], on_rollout: OnRollout) -> list[Group]:
        """Record the rollouts that ended in a step; returns the groups that they complete.

        A problem whose rollout cannot be recorded has an `error` afterwards.
        """
        done = []
        for rollout in ended:
            run = self._runs[rollout.group]
            try:
                result = run.take(rollout)
            except STOPS:
                raise
            except BaseException as error:
                run.fail(error)
                continue
            on_rollout(run, rollout, result)
            if not run.pending:
                done.append(rollout.group)
        return done

    def _end_failed(self) -> list[tuple[ProblemRun, Answer]]:
        """End the problems that failed while their rollouts ran."""
        failed = [run for run in self.runs if run.error]
        answers = [(run, Answer.of(run, run.error)) for run in failed]
        for run in failed:
            self.cancel(run)
        return answers
