"""A simulated cluster: a replica of the model on every GPU, and one queue that they pull from.

A problem stays on the GPU that pulled it: the KV of its image is there, and its later rounds need
no other GPU's clock. A single GPU takes every problem on arrival, so its policy sees the whole
queue; one of several GPUs takes the next problem when none of its rollouts is waiting to start.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from model.config import STEP3_VL_10B, Config
from model.errors import InputError
from pacore_sched.sched.policy import ORACLES, POLICIES
from pacore_sched.sim.cost_model import CostModel, RooflineCost, StepWork, kv_capacity
from pacore_sched.sim.machine import MACHINES, Machine
from pacore_sched.sim.simulator import Record, Replica, Usage
from pacore_sched.sim.workload import MAX_TOKENS, SimProblem


@dataclass(frozen=True)
class Setting:
    """The simulated system. `num_pages` and `cost` are derived from the machine if None."""

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
    num_pages: int | None = None
    cost: CostModel | None = None

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


@dataclass
class SimResult:
    """The result of a run: a record per rollout, a usage per GPU, and when problems ended."""

    setting: Setting
    problems: Sequence[SimProblem]
    records: list[Record] = field(default_factory=list)
    answered_s: list[float] = field(default_factory=list)  # per problem
    usages: list[Usage] = field(default_factory=list)
    preemptions: int = 0
    recomputed_tokens: int = 0
    cancelled_tokens: int = 0
    prefix_hit_tokens: int = 0


def simulate(
    problems: Sequence[SimProblem],
    setting: Setting,
    on_answer: Callable[[int], None] = lambda problems: None,
) -> SimResult:
    """Run all problems to their answers; `on_answer(1)` is called for each.

    Raises InputError if a rollout's KV can never fit on one GPU.
    """
    result = SimResult(setting, problems, answered_s=[0.0] * len(problems))

    def answer(number: int, seconds: float) -> None:
        result.answered_s[number] = seconds
        on_answer(1)

    replicas = [_replica(setting, result, answer) for _ in range(setting.gpus)]
    order = sorted(range(len(problems)), key=lambda number: problems[number].arrival_s)
    try:
        _run(replicas, [(number, problems[number]) for number in order])
    except ValueError as error:
        raise InputError(f"a problem does not fit in a GPU's KV: {error}") from None
    for replica in replicas:
        counts = replica.scheduler.counts
        result.usages.append(replica.executor.usage)
        result.preemptions += counts.preemptions
        result.recomputed_tokens += counts.recomputed
        result.cancelled_tokens += counts.cancelled
        result.prefix_hit_tokens += counts.prefix_hits
    return result


def _replica(setting: Setting, result: SimResult, answer: Callable[[int, float], None]) -> Replica:
    name = setting.policy
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
        on_round=result.records.extend,
        on_answer=answer,
    )
    return replica


def _run(replicas: Sequence[Replica], queue: Sequence[tuple[int, SimProblem]]) -> None:
    """Repeatedly step the replica with the earliest clock, until all problems are answered."""
    taken = 0
    clocks = [(0.0, index) for index in range(len(replicas))]
    while clocks:
        clock, index = heapq.heappop(clocks)
        replica = replicas[index]
        replica.executor.clock = clock
        while taken < len(queue) and queue[taken][1].arrival_s <= clock:
            if len(replicas) > 1 and replica.waits:
                break
            replica.submit(*queue[taken])
            taken += 1
        arrival = queue[taken][1].arrival_s if taken < len(queue) else float("inf")
        takes_next = arrival > clock and (len(replicas) == 1 or not replica.waits)
        if replica.step(arrival if takes_next else float("inf")):
            heapq.heappush(clocks, (replica.executor.clock, index))
        elif replica.runs:
            raise RuntimeError("the scheduler has unfinished work but no batch to run")
        elif taken < len(queue):
            heapq.heappush(clocks, (max(clock, arrival), index))
