"""What the coordinator and the replicas send each other: tasks and orders one way, reports back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

from pacore_sched.answers.images import ImageData
from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.live import Answer
from pacore_sched.answers.problem_run import Part
from pacore_sched.engine.engine import EngineStats
from pacore_sched.sched.prompts import Counts
from pacore_sched.sched.queue_load import QueueLoad
from pacore_sched.sched.request import Partial
from pacore_sched.sim.replica_state import ReplicaState

Sums = TypeVar("Sums", EngineStats, Counts)


class Key(NamedTuple):
    """A task: a problem by its number, in order of arrival, or a part of one (> 0)."""

    problem: int
    part: int = 0


@dataclass(frozen=True)
class Task:
    """A problem to be answered, or one of its parts.

    images: those of the conversation's image parts, in their order
    known: results that need not be computed again; with `part`, those of all earlier rounds
    """

    key: Key
    id: str
    messages: Sequence[dict]
    images: Sequence[ImageData] = ()
    known: Sequence[RolloutResult] = ()
    part: Part | None = None


@dataclass
class Orders:
    """What a replica does next. It returns a Report after `seconds`, or when it has no work.

    detach: (problem, round, indices): rollouts that are to leave
    ended: results of rollouts that left: the problem, and how the rollout ended elsewhere
    cancel: tasks that are no longer needed
    more: more problems wait: return as soon as the replica takes one (QueueLoad.takes)
    ahead: whether it also takes one that could not start yet
    """

    tasks: list[Task] = field(default_factory=list)
    detach: list[tuple[int, int, Sequence[int]]] = field(default_factory=list)
    ended: list[tuple[int, RolloutResult]] = field(default_factory=list)
    cancel: list[Key] = field(default_factory=list)
    more: bool = False
    ahead: bool = False
    seconds: float = 0.0

    def __bool__(self) -> bool:
        """Whether there is anything new for the replica to do."""
        return bool(self.tasks or self.detach or self.ended or self.cancel)


@dataclass
class Totals:
    """What has been done, in a run or since a replica's last report."""

    engine: EngineStats = field(default_factory=EngineStats)
    scheduler: Counts = field(default_factory=Counts)

    def add(self, other: "Totals") -> None:
        for mine, more in ((self.engine, other.engine), (self.scheduler, other.scheduler)):
            sums = vars(mine)
            for name, value in vars(more).items():
                sums[name] += value

    def since(self, earlier: "Totals") -> "Totals":
        """What has been added since these totals were `earlier`."""
        return Totals(
            _difference(self.engine, earlier.engine), _difference(self.scheduler, earlier.scheduler)
        )


def _difference(new: Sums, old: Sums) -> Sums:
    return replace(new, **{name: value - getattr(old, name) for name, value in vars(new).items()})


@dataclass
class Report:
    """What has happened on a replica since its last report.

    results: every rollout that ended or was cancelled, by its task
    answers: the problems that ended, and the parts; a part's answer has no text
    detached: the task that rollouts have left, its round, index -> what they have generated
    overtaken: (problem, round): the round has ended, its rollouts elsewhere are not needed
    busy: whether the replica has work
    load: whether it takes another problem
    kv_used: share of the KV pages in use
    peak_bytes: the most memory that the process has used, on a GPU that of its tensors there
    state: what could move, if no more problems wait
    totals: what has been done since
    measured: whether the state's cost model has been fitted to steps; if not, it is no guess
    """

    results: list[tuple[Key, RolloutResult]] = field(default_factory=list)
    answers: list[tuple[Key, Answer]] = field(default_factory=list)
    detached: list[tuple[Key, int, Mapping[int, Partial]]] = field(default_factory=list)
    overtaken: list[tuple[int, int]] = field(default_factory=list)
    busy: bool = False
    load: QueueLoad = QueueLoad()
    kv_used: float = 0.0
    peak_bytes: int = 0
    totals: Totals = field(default_factory=Totals)
    state: ReplicaState | None = None
    measured: bool = False

    @property
    def memory(self) -> str:
        """The use of memory, for a message."""
        return f"{self.kv_used:.0%} of the KV pages in use, {self.peak_bytes / 1e9:.2f} GB at most"
