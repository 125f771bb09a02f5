"""A random engine: its sizes, its policy and the texts of its model."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from random import Random

from bench.stress.hash_model import HashModel
from kernels.runtime.arithmetic import cdiv
from pacore_sched.sched.policy import POLICIES, LaterRoundFirst, SchedulerState
from pacore_sched.sched.request import Group, Rollout


@dataclass(frozen=True)
class Config:
    """A random engine."""

    num_pages: int
    page_size: int
    max_running: int
    token_budget: int
    host_pages: int
    ahead: bool
    speculate: int
    policy: str
    prefix_cache: bool
    model: HashModel

    @staticmethod
    def of(draw: Random) -> "Config":
        page_size = draw.choice((1, 2, 3, 4, 4, 8, 16))
        max_running = draw.choice((1, 2, 4, 8, 12, 20, 30))
        return Config(
            num_pages=cdiv(draw.choice((40, 60, 80, 120)), page_size),
            page_size=page_size,
            max_running=max_running,
            token_budget=max_running + draw.choice((0, 1, 5, 20, 100)),
            host_pages=cdiv(draw.choice((0, 10, 60, 1000)), page_size),
            ahead=draw.random() < 0.6,
            speculate=draw.choice((0, 0, 1, 4, max_running)),
            policy=draw.choice([*POLICIES, *3 * ("later-round-first", "fcfs", "random", "random")]),
            prefix_cache=draw.random() < 0.8,
            model=HashModel(draw.choice((1, 3, 6, 20)), draw.choice((0, 0, 100))),
        )


class RandomPolicy(LaterRoundFirst):
    """Decides everything at random: the scheduler must be right under any policy.

    The order changes when a rollout ends. In every step, prompts would drop each other for ever.
    """

    fixed_keys = False

    def __init__(self, draw: Random) -> None:
        super().__init__()
        self._draw, self._order = draw, draw.random()

    def key(self, group: Group) -> tuple:
        return (hash((self._order, group.number)),)

    def ended(self, rollout: Rollout) -> None:
        self._order = self._draw.random()

    def order(self, rollouts: Iterable[Rollout]) -> list[Rollout]:
        return self._draw.sample([*rollouts], k=len([*rollouts]))

    def admits(self, rollout: Rollout, pages: int, state: SchedulerState) -> bool:
        return pages <= state.tree.free_pages and self._draw.random() < 0.9

    def victim(self, running: Collection[Rollout]) -> Rollout:
        return self._draw.choice([*running])
