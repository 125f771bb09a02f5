"""What a replica has to do, as plain numbers: its unfinished rollouts, and what a step costs."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from pacore_sched.sched.scheduler import Scheduler
from pacore_sched.sim.cost_model import CostModel, StepShape

WATERMARK = 0.01  # share of the pages that stays free when rollouts start


class RolloutState(NamedTuple):
    """An unfinished rollout of `tokens` tokens; it waits if it has no pages yet."""

    number: int  # its index in the round
    tokens: int
    waiting: bool


class GroupState(NamedTuple):
    """The unfinished rollouts of one round of a problem that one replica holds."""

    problem: int
    round: int
    prompt_tokens: int
    max_tokens: int
    rollouts: tuple[RolloutState, ...]


@dataclass(frozen=True)
class ReplicaState:
    """The rollouts of one replica, each (problem, round) once, and what their steps cost there."""

    groups: tuple[GroupState, ...]
    num_pages: int
    page_size: int
    max_running: int
    cost: CostModel

    @cached_property
    def load(self) -> "Load":
        """What the policy compares. Computed once, and pickled with the state."""
        return Load(self)

    @property
    def usable_pages(self) -> float:
        """Pages that may be in use when a rollout starts."""
        return (1 - WATERMARK) * self.num_pages


class Load:
    """How much a replica runs, and the time of a step.

    Rollouts that only wait for their prompt, or for the next step, count as running.
    """

    def __init__(self, given: ReplicaState) -> None:
        self.state = given
        shape = self._count()
        if self.waiting:
            self.state = _started(given, self.running, self.pages)
            shape = self._count()
        self.step_s = given.cost.seconds(shape) if self.running else 0.0
        # Whether a rollout that comes here would start at once, if the pages suffice.
        self.open = not self.waiting and self.running < self.state.max_running

    def _count(self) -> StepShape:
        """Count rollouts and pages; returns the shape of a decode step."""
        size = self.state.page_size
        self.running = self.waiting = self.pages = shared = unshared = segments = 0
        for group in self.state.groups:
            tokens = [rollout.tokens for rollout in group.rollouts if not rollout.waiting]
            count = len(tokens)
            self.waiting += len(group.rollouts) - count
            if count:
                total, prompt = sum(tokens), group.prompt_tokens
                self.running += count
                self.pages += sum([pages_of(held, size) for held in (prompt, *tokens)])
                shared += prompt + total
                unshared += prompt * count + total
                segments += 1
        return StepShape(self.running, self.running, shared, unshared, unshared, segments)


def replica_state(scheduler: Scheduler, cost: CostModel) -> ReplicaState:
    """A scheduler's state, without rollouts whose max_tokens are all scheduled."""
    groups: dict[tuple[int, int], GroupState] = {}
    for group in scheduler.groups:
        rollouts = tuple(
            RolloutState(rollout.index, rollout.scheduled, rollout.node < 0)
            for rollout in group.rollouts
            if not rollout.finish_reason and rollout.scheduled < rollout.max_tokens
        )
        if not rollouts:
            continue
        key = group.problem, group.round
        if key in groups:  # rollouts that came in several moves
            rollouts = groups[key].rollouts + rollouts
        max_tokens = group.rollouts[0].max_tokens
        groups[key] = GroupState(*key, group.prompt_tokens, max_tokens, rollouts)
    tree = scheduler.tree
    return ReplicaState(
        tuple(groups.values()), tree.num_pages, tree.page_size, scheduler.max_running, cost
    )


def _started(state: ReplicaState, running: int, pages: int) -> ReplicaState:
    """The state with those waiting rollouts started that find pages and slots."""
    size = state.page_size
    groups, full = [], False
    for group in state.groups:
        prompt = all(rollout.waiting for rollout in group.rollouts)
        rollouts = []
        for rollout in group.rollouts:
            if rollout.waiting and not full:
                more = pages_of(rollout.tokens, size)
                more += pages_of(group.prompt_tokens, size) if prompt else 0
                full = running == state.max_running or pages + more > state.usable_pages
                if not full:
                    running, pages, prompt = running + 1, pages + more, False
                    rollout = rollout._replace(waiting=False)
            rollouts.append(rollout)
        groups.append(group._replace(rollouts=tuple(rollouts)))
    return replace(state, groups=tuple(groups))


def pages_of(tokens: int, page_size: int) -> int:
    """Pages of a rollout or a prompt, with the token that is next."""
    return tokens // page_size + 1
