"""A simulated cluster: a replica of the model on every GPU, and one queue that they pull from.

A single GPU takes every problem on arrival, so its policy sees the whole queue; one of several GPUs
takes the next problem when none of its rollouts is waiting to start (sched/queue_load.py). This GPU
is the problem's home: the KV of its image is there, and all its rounds are submitted there. When
the queue is empty, rollouts may move to other GPUs (tail_moves.py).
GPUs have their own clocks, and messages between them: a message is received at the time at which it
was sent, or later if the receiver is already in a step that ends later. It takes no time itself.
"""

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count
from math import inf

from model.config import STEP3_VL_10B, Config
from model.errors import InputError
from pacore_sched.sched.policy import ORACLES, POLICIES
from pacore_sched.sched.queue_load import QueueLoad
from pacore_sched.sched.view_queue import DEFAULT_VISION_BUDGET, VISION_BUDGETS
from pacore_sched.sim.cost_model import CostModel, RooflineCost, StepWork, kv_capacity
from pacore_sched.sim.executor import Usage
from pacore_sched.sim.machine import MACHINES, Machine
from pacore_sched.sim.replica_state import ReplicaState, replica_state
from pacore_sched.sim.simulator import Record, Replica
from pacore_sched.sim.tail_moves import TailMoves
from pacore_sched.sim.vision.cost import RooflineVision, VisionCost, VisionWork
from pacore_sched.sim.vision.encoder import SimEncoder
from pacore_sched.sim.workload import MAX_TOKENS, SimProblem


@dataclass(frozen=True)
class Setting:
    """The simulated system. `num_pages` and the costs are derived from the machine if None."""

    policy: str = "later-round-first"
    gpus: int = 1
    machine: Machine = MACHINES["h200"]
    config: Config = STEP3_VL_10B
    shared_reads: bool = True
    kv_dtype: str = "bf16"
    max_running: int = 256
    token_budget: int = 2048
    page_size: int = 64
    max_tokens: int = MAX_TOKENS
    need_share: float = 1.0
    migrate: bool = True  # whether rollouts may move to other GPUs
    move_period_s: float = 1.0  # at most one decision about moves per period
    vision_budget: str = DEFAULT_VISION_BUDGET
    concurrency: int | None = None  # submit a problem when one of this many is answered
    num_pages: int | None = None
    cost: CostModel | None = None
    vision_cost: VisionCost | None = None

    def pages(self) -> int:
        """KV pages of one GPU. Raises InputError if the weights leave no room for KV."""
        if self.num_pages is not None:
            return self.num_pages
        tokens = kv_capacity(self.config, self.machine, self.kv_dtype)
        if tokens < self.page_size:
            raise InputError(
                f"the weights of {self.config.name} leave no room for KV on {self.machine.name}"
            )
        return tokens // self.page_size

    def cost_model(self) -> CostModel:
        """`cost` if there is one, else the machine's roofline."""
        work = StepWork(self.config.decoder, self.kv_dtype)
        return self.cost or RooflineCost(work, self.machine, self.shared_reads)

    def encoder(self) -> SimEncoder | None:
        """What encodes the images on one GPU; None if the model takes none."""
        if self.config.vision is None:
            return None
        work = VisionWork(self.config.vision, self.config.decoder.hidden)
        cost = self.vision_cost or RooflineVision(work, self.machine)
        return SimEncoder(cost, self.machine, VISION_BUDGETS[self.vision_budget])


@dataclass
class SimResult:
    """The result of a run: a record per rollout, a usage per GPU, and when problems arrived (with
    `Setting.concurrency`, others than asked for) and ended."""

    setting: Setting
    problems: Sequence[SimProblem]
    records: list[Record] = field(default_factory=list)
    answered_s: list[float] = field(default_factory=list)  # per problem
    usages: list[Usage] = field(default_factory=list)
    preemptions: int = 0
    recomputed_tokens: int = 0
    cancelled_tokens: int = 0
    prefix_hit_tokens: int = 0
    moved_rollouts: int = 0
    moved_tokens: int = 0  # that moved rollouts had: they are written again, after their prompts
    arrivals: list[float] = field(init=False)  # per problem

    def __post_init__(self) -> None:
        self.arrivals = [problem.arrival_s for problem in self.problems]


def simulate(
    problems: Sequence[SimProblem],
    setting: Setting,
    on_answer: Callable[[int], None] = lambda problems: None,
) -> SimResult:
    """Run all problems to their answers; `on_answer(1)` is called for each.

    Raises InputError if a rollout's KV can never fit on one GPU.
    """
    result = SimResult(setting, problems, answered_s=[0.0] * len(problems))
    cluster = Cluster(problems, setting, result, on_answer)
    try:
        cluster.run()
    except ValueError as error:
        raise InputError(f"a problem does not fit in a GPU's KV: {error}") from None
    for replica in cluster.replicas:
        counts = replica.scheduler.counts
        result.usages.append(replica.executor.usage)
        result.preemptions += counts.preemptions
        result.recomputed_tokens += counts.recomputed
        result.cancelled_tokens += counts.cancelled
        result.prefix_hit_tokens += counts.prefix_hits
    return result


class Cluster:
    """The replicas, their clocks, the queue, and the messages between replicas."""

    def __init__(
        self,
        problems: Sequence[SimProblem],
        setting: Setting,
        result: SimResult,
        on_answer: Callable[[int], None],
    ) -> None:
        self.problems, self.setting, self.result = problems, setting, result
        self.on_answer = on_answer
        self.arrivals = result.arrivals
        self.submitted = min(setting.concurrency or len(problems), len(problems))
        if setting.concurrency:  # a trace's times do not matter
            self.arrivals[: self.submitted] = [0.0] * self.submitted
        self.arrivals[self.submitted :] = [inf] * (len(problems) - self.submitted)
        self.queue = sorted(range(len(problems)), key=self.arrivals.__getitem__)
        self.taken = 0
        self.replicas = [self._replica(index) for index in range(setting.gpus)]
        # When each replica runs next, and a heap of these times that also has outdated entries.
        self.due = [0.0] * setting.gpus
        self.clocks = [(0.0, index) for index in range(setting.gpus)]
        # Per replica a heap of (time, number, function that the receiver runs).
        self.inboxes: list[list[tuple[float, int, Callable[[], None]]]] = [
            [] for _ in self.replicas
        ]
        self.numbers = count()
        self.homes: dict[int, int] = {}  # problem -> replica
        self.hosts: dict[tuple[int, int], set[int]] = {}  # (problem, round) -> replicas of guests
        self.tail = TailMoves() if setting.migrate and setting.gpus > 1 else None
        self.states: dict[int, ReplicaState] = {}  # that still hold
        self.changed = False  # whether a rollout started or ended since the last decision
        self.next_moves_s = 0.0

    def run(self) -> None:
        """Repeatedly step the replica with the earliest clock, until all problems are answered."""
        while self.clocks:
            clock, index = heappop(self.clocks)
            if clock != self.due[index]:
                continue
            replica, inbox = self.replicas[index], self.inboxes[index]
            replica.executor.clock = clock
            while inbox and inbox[0][0] <= clock:
                heappop(inbox)[2]()
                self._touch(index)
            arrival = self._take(index)
            if self.tail and clock >= self.next_moves_s and self._queue_is_empty(clock):
                self._move_rollouts(self.tail, clock)
            takes_next = arrival > clock and self._takes(index, ahead=True)
            until = min(arrival if takes_next else inf, inbox[0][0] if inbox else inf)
            stepped = replica.step(until)
            self.due[index] = inf
            if stepped:
                self.states.pop(index, None)
                self._schedule(index, replica.executor.clock)
            elif inbox or self.taken < len(self.queue):
                self._schedule(index, max(clock, until))
        if any(replica.runs for replica in self.replicas):
            raise RuntimeError("a scheduler has unfinished work but no batch to run")

    def _replica(self, index: int) -> Replica:
        setting, name = self.setting, self.setting.policy
        oracle = ORACLES.get(name)
        replica: Replica = Replica(
            oracle(lambda rollout: replica.length(rollout)) if oracle else POLICIES[name](),
            setting.cost_model(),
            setting.pages(),
            setting.page_size,
            max_running=setting.max_running,
            token_budget=setting.token_budget,
            max_tokens=setting.max_tokens,
            context=setting.config.decoder.max_positions,
            need_share=setting.need_share,
            on_round=lambda records: self._round_ended(index, records),
            on_answer=self._answered,
            on_end=lambda record: self._rollout_ended(index, record),
            encoder=setting.encoder(),
        )
        return replica

    def _queue_is_empty(self, clock: float) -> bool:
        return self._next_arrival() > clock

    def _next_arrival(self) -> float:
        return self.arrivals[self.queue[self.taken]] if self.taken < len(self.queue) else inf

    def _ahead(self, clock: float) -> bool:
        """Whether more problems wait in the queue than there are replicas."""
        last = self.taken + len(self.replicas)
        return last < len(self.queue) and self.arrivals[self.queue[last]] <= clock

    def _takes(self, index: int, *, ahead: bool) -> bool:
        load = QueueLoad.of(self.replicas[index].scheduler)
        return len(self.replicas) == 1 or load.takes(ahead=ahead)

    def _take(self, index: int) -> float:
        """Let a replica take problems from the queue; returns the arrival time of the next one."""
        replica = self.replicas[index]
        clock = replica.executor.clock
        while not self._queue_is_empty(clock) and self._takes(index, ahead=self._ahead(clock)):
            number = self.queue[self.taken]
            replica.submit(number, self.problems[number])
            self.homes[number] = index
            self.taken += 1
            self._touch(index)
        return self._next_arrival()

    def _schedule(self, index: int, time: float) -> None:
        """Run a replica at a time, or earlier if it is due earlier."""
        if time < self.due[index]:
            self.due[index] = time
            heappush(self.clocks, (time, index))

    def _send(self, receiver: int, time: float, message: Callable[[], None]) -> None:
        heappush(self.inboxes[receiver], (time, next(self.numbers), message))
        self._schedule(receiver, max(time, self.replicas[receiver].executor.clock))

    def _touch(self, index: int) -> None:
        """Note that a replica's load has changed."""
        self.states.pop(index, None)
        self.changed = True

    def _rollout_ended(self, index: int, record: Record) -> None:
        self._touch(index)
        problem, round = record.problem, record.round
        if self.tail:
            self.tail.ended(problem, round, record.length)
        home = self.homes[problem]
        if home != index:
            to_home = self.replicas[home]
            self._send(home, record.ended_s, lambda: to_home.ended_elsewhere(problem, round))

    def _round_ended(self, index: int, records: Sequence[Record]) -> None:
        self.result.records.extend(records)
        key = records[0].problem, records[0].round
        hosts = self.hosts.pop(key, ())
        if any(record.cancelled for record in records):
            for host in hosts:
                replica = self.replicas[host]
                clock = self.replicas[index].executor.clock
                self._send(host, clock, partial(replica.cancel_guests, *key))

    def _answered(self, problem: int, seconds: float) -> None:
        self.result.answered_s[problem] = seconds
        if self.submitted < len(self.queue):  # at once taken here, if not elsewhere
            number = self.queue.pop(self.submitted)
            self.arrivals[number] = seconds
            # In order of arrival: another GPU, whose clock is ahead, may have answered before.
            key = self.arrivals.__getitem__
            insort(self.queue, number, lo=self.taken, hi=self.submitted, key=key)
            self.submitted += 1
        if self.tail:
            self.tail.forget(problem)
        self.on_answer(1)

    def _move_rollouts(self, tail: TailMoves, clock: float) -> None:
        """Execute the moves that pay, among replicas that have no messages to receive."""
        if not self.changed:
            return
        self.changed, self.next_moves_s = False, clock + self.setting.move_period_s
        for index, replica in enumerate(self.replicas):
            if index not in self.states:
                self.states[index] = replica_state(replica.scheduler, replica.executor.cost)
        states = {i: state for i, state in self.states.items() if not self.inboxes[i]}
        for source, target, problem, round, indices in tail.moves(states):
            moved = self.replicas[source].detach(problem, round, indices)
            self.states.pop(source, None)
            self.hosts.setdefault((problem, round), set()).add(target)
            receiver = self.replicas[target]
            photos = self.problems[problem].photos
            accept = partial(receiver.accept, moved, photos)
            self._send(target, self.replicas[source].executor.clock, accept)
            self.result.moved_rollouts += len(indices)
            self.result.moved_tokens += sum(rollout.scheduled for rollout in moved.records)
