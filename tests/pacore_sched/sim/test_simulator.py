"""The simulator: skipping from event to event changes nothing, and nothing is lost on the way."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from model.config import TINY
from model.errors import InputError
from pacore_sched.engine.engine import Engine
from pacore_sched.engine.stopping import Stopping
from pacore_sched.sched.policy import POLICIES, LaterRoundFirst
from pacore_sched.sched.request import Batch, Chunk, Group, Rollout, Sampling, Segment
from pacore_sched.sched.scheduler import Scheduler
from pacore_sched.sim.cluster import Setting, simulate
from pacore_sched.sim.cost_model import RooflineCost, StepShape, StepWork
from pacore_sched.sim.machine import Machine
from pacore_sched.sim.simulator import Replica, SimExecutor, step_shape
from pacore_sched.sim.workload import SimProblem

# Slow enough for overhead, bytes and FLOPs to matter alike at these sizes.
MACHINE = Machine("toy", copy_gb_s=10, gemm_tflop_s=0.01, memory_bytes=1e9, workspace_bytes=0)
SMALL = Setting(
    machine=MACHINE, config=TINY, max_running=24, token_budget=64, page_size=8, max_tokens=400
)
TIGHT = replace(SMALL, num_pages=80)  # 640 tokens: rollouts get in each other's way


def problems(count, seed=0, widths=(5, 3), spacing=0.0, image=20):
    """Problems of every length from 1 to 200 tokens."""
    rng = np.random.default_rng(seed)
    return [
        SimProblem(
            number * spacing,
            image,
            int(rng.integers(1, 40)),
            tuple(tuple(rng.integers(1, 200, width).tolist()) for width in (*widths, 1)),
            template_tokens=3,
            message_tokens=6,
        )
        for number in range(count)
    ]


def token_by_token(cost, work):
    """Ends of all rollouts of problems without images, by the plainest loop there is.

    Memory without end and a token budget that no step reaches: a prompt is written in one step,
    beside what decodes, and its rollouts start in the next.
    """
    clock, ends = 0.0, {}
    arriving = sorted(range(len(work)), key=lambda number: work[number].arrival_s)
    prompts, asked, written, running = {}, [], set(), {}

    def ask(number, turn, ended=None):
        prompts[number, turn] = work[number].prompt_tokens(ended) - 1
        asked.append((number, turn))

    while arriving or asked or running:
        while arriving and work[arriving[0]].arrival_s <= clock:
            ask(arriving.pop(0), 0)
        if not asked and not running:
            clock = work[arriving[0]].arrival_s
            continue
        fresh = [key for key in asked if prompts[key] and key not in written]
        for number, turn in set(asked) - set(fresh):
            running |= {(number, turn, i): 0 for i in range(len(work[number].lengths[turn]))}
        asked, written = fresh, written | set(fresh)
        running = {key: tokens + 1 for key, tokens in running.items()}
        clock += cost.seconds(plain_shape(running, prompts, [prompts[key] for key in fresh]))
        for key in [key for key, tokens in running.items() if tokens == length(work, key)]:
            number, turn, _ = key
            del running[key]
            ends[key] = clock
            lengths = work[number].lengths
            over = all((number, turn, index) in ends for index in range(len(lengths[turn])))
            if over and turn + 1 < len(lengths):
                ask(number, turn + 1, lengths[turn])
    return ends


def length(work, key):
    number, turn, index = key
    return work[number].lengths[turn][index]


def plain_shape(running, prompts, chunks):
    """The step of rollouts with so many tokens, and of whole prompts that are written beside."""
    own = sum(running.values()) + sum(chunks)
    unshared = own + sum(prompts[key[:2]] for key in running)
    shared = own + sum(prompts[key] for key in {key[:2] for key in running})
    pairs = unshared - sum(chunks) + sum(n * (n + 1) // 2 for n in chunks)
    return StepShape(len(running) + sum(chunks), len(running), shared, unshared, pairs)


def ends_of(result):
    """(problem, round, length) -> ends, ascending, of all its rollouts."""
    found = {}
    for record in result.records:
        key = record.problem, record.round, record.length
        found[key] = sorted([*found.get(key, []), record.ended_s])
    return found


@pytest.mark.parametrize("shared_reads", [True, False])
@pytest.mark.parametrize("spacing", [0.0, 0.8])
def test_events_against_token_by_token(shared_reads, spacing):
    """Guards skipping: every rollout ends when it does in a loop that goes token by token."""
    setting = replace(
        SMALL,
        policy="fcfs",
        shared_reads=shared_reads,
        num_pages=10_000,
        max_running=300,
        token_budget=4000,
    )
    work = problems(6, spacing=spacing, image=0)
    work[0] = replace(work[0], question_tokens=1)  # no segment at all: it starts at once
    expected = {}
    for key, end in token_by_token(setting.cost_model(), work).items():
        place = (*key[:2], length(work, key))
        expected[place] = sorted([*expected.get(place, []), end])
    found = ends_of(simulate(work, setting))
    assert found.keys() == expected.keys()
    for key, ends in expected.items():
        assert found[key] == pytest.approx(ends, rel=1e-9)


@pytest.mark.parametrize("policy", POLICIES)
def test_skipping_changes_nothing_when_memory_is_short(policy, monkeypatch):
    """Guards skipping where rollouts are preempted: stopping after every step ends them alike."""
    setting = replace(TIGHT, policy=policy)
    work = problems(6)
    skipped = simulate(work, setting)
    step = Replica.step
    monkeypatch.setattr(Replica, "step", lambda self, _: step(self, self.executor.clock))
    single = simulate(work, setting)
    assert skipped.preemptions == single.preemptions
    assert skipped.preemptions or policy not in ("fcfs", "later-round-first")  # memory is short
    assert sum(len(usage.ends) for usage in skipped.usages) < sum(
        len(usage.ends) for usage in single.usages
    )
    for found, expected in zip(skipped.records, single.records, strict=True):
        assert found.ended_s == pytest.approx(expected.ended_s, rel=1e-9)
        assert found.first_s == pytest.approx(expected.first_s, rel=1e-9)
    used, single_used = skipped.usages[0], single.usages[0]
    assert (used.bytes, used.flops, used.steps) == (
        single_used.bytes,
        single_used.flops,
        single_used.steps,
    )
    assert used.bytes_saved == single_used.bytes_saved


@pytest.mark.parametrize("gpus", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_rollout_ends_once(policy, gpus):
    """Guards conservation: all tokens of all rounds, one round after the other, answers last."""
    work = problems(8, spacing=0.05)
    result = simulate(work, replace(TIGHT, policy=policy, gpus=gpus))
    assert len(result.records) == sum(len(r) for p in work for r in p.lengths)
    assert sum(r.length for r in result.records) == sum(p.tokens for p in work)
    for number, problem in enumerate(work):
        records = [r for r in result.records if r.problem == number]
        assert sorted((r.round, r.length) for r in records) == sorted(
            (turn, n) for turn, lengths in enumerate(problem.lengths) for n in lengths
        )
        for record in records:
            assert problem.arrival_s <= record.submitted_s < record.first_s <= record.ended_s
            before = [r.ended_s for r in records if r.round == record.round - 1]
            assert record.submitted_s >= max(before, default=0.0)
        assert result.answered_s[number] == max(r.ended_s for r in records)
    assert not any(record.cancelled for record in result.records)


def replica_over(work, **changes):
    """A replica with the problems submitted, and the list that their answers go to."""
    answers = []
    options = {"num_pages": 80, "page_size": 8, "max_running": 24, "token_budget": 64}
    replica = Replica(
        POLICIES["later-round-first"](),
        SMALL.cost_model(),
        **options | changes,
        max_tokens=400,
        on_round=lambda records: None,
        on_answer=lambda number, seconds: answers.append(number),
    )
    for number, problem in enumerate(work):
        replica.submit(number, problem)
    return replica, answers


def test_pages_come_back():
    """Guards KV: when all is answered every page is free again, the images' too."""
    replica, answers = replica_over(problems(4))
    while replica.step():
        replica.scheduler.check_integrity()
    assert sorted(answers) == [0, 1, 2, 3]
    assert replica.scheduler.tree.free_pages == 80
    assert not replica.runs


def test_an_image_is_prefilled_once_and_cancelled_rollouts_leave_no_message():
    """Guards what later rounds write: no image again, and a message per rollout that ended."""
    lengths = ((30, 50, 90, 130), (10,))
    problem = SimProblem(0.0, 20, 12, lengths, template_tokens=3, message_tokens=40)
    for share, messages in ((1.0, 30 + 40 + 40 + 40), (0.5, 30 + 40)):
        replica, answers = replica_over([problem], need_share=share)
        while replica.step():
            pass
        # Of every prompt all but the last token, which a rollout's own node begins with.
        assert replica.scheduler.counts.prefilled == 20 + 11 + (12 + 3 + messages - 1)
        assert answers == [0]


def test_same_outcome_every_time():
    """Guards determinism: two runs of the same problems agree to the last bit."""
    setting = replace(TIGHT, gpus=2)
    first, second = (simulate(problems(6), setting) for _ in range(2))
    assert first.records == second.records
    assert first.answered_s == second.answered_s


def test_next_round_at_a_share_of_the_rollouts():
    """Guards synthesis at M of N: the slowest are cancelled, and their messages not waited for."""
    work = problems(5)
    all_of_them = simulate(work, SMALL)
    most = simulate(work, replace(SMALL, need_share=0.6))
    rounds = {}
    for record in most.records:
        rounds.setdefault((record.problem, record.round), []).append(record.cancelled)
    for (_, turn), cancelled in rounds.items():
        # Rollouts that reach their last token in the step that ends the round have ended too.
        assert sum(cancelled) <= {0: 2, 1: 1, 2: 0}[turn]
    assert sum(map(sum, rounds.values())) > 5
    assert most.cancelled_tokens > 0
    assert max(most.answered_s) < max(all_of_them.answered_s)


def test_more_gpus_share_the_work():
    """Guards the queue: problems spread over the GPUs, and each keeps its rounds."""
    work = problems(12)
    one, four = (simulate(work, replace(TIGHT, gpus=gpus)) for gpus in (1, 4))
    assert max(four.answered_s) < 0.5 * max(one.answered_s)
    assert all(len(usage.ends) > 20 for usage in four.usages)


def test_pages_kept_free_are_no_reason_to_schedule_every_step():
    """Guards the simulator's speed, and the engine's plans: running rollouts may grow into the
    watermark a page at a time, as long as there are pages."""
    scheduler = Scheduler(100, 64, LaterRoundFirst(watermark=0.5), max_running=4)
    group = Group([], 0, Sampling(1600), need=4)
    group.rollouts = [Rollout(group, index, 0, 1600) for index in range(4)]
    scheduler.submit(group)
    batches = set()
    while (batch := scheduler.schedule()) and scheduler.tree.free_pages:
        batches.add(batch)
    assert scheduler.steps > 1500
    assert len(batches) < 2 * 1600 / 64


def test_idle_until_the_next_arrival():
    """Guards the clock between problems: work starts when it arrives, not when the last ended."""
    work = problems(3, spacing=1000.0)
    result = simulate(work, SMALL)
    alone = simulate([replace(work[2], arrival_s=0.0)], SMALL)
    assert result.answered_s[2] - 2000 == pytest.approx(alone.answered_s[0], rel=1e-9)


def test_what_never_fits_is_refused():
    """Guards against waiting forever for pages that no GPU has."""
    with pytest.raises(InputError, match="does not fit"):
        simulate(problems(1), replace(SMALL, num_pages=40))
    with pytest.raises(InputError, match="no room for KV"):
        simulate(problems(1), replace(SMALL, machine=replace(MACHINE, memory_bytes=1e6)))


def test_step_shape_by_hand():
    """Guards what a step is charged for: shared nodes once, chunks with what stands above them."""
    scheduler = Scheduler(100, 8, POLICIES["fcfs"](), max_running=8, token_budget=64)
    image, question = Segment(30), Segment(50)
    group = Group([image, question], 0, Sampling(100), need=2)
    group.rollouts = [Rollout(group, index, 0, 100) for index in range(2)]
    scheduler.submit(group)
    shapes = [step_shape(scheduler.tree, scheduler.schedule()) for _ in range(4)]
    # The image, then all of the question, then both rollouts' first tokens.
    assert shapes[0] == StepShape(30, 0, 30, 30, 30 * 31 // 2, 1)
    assert shapes[1] == StepShape(50, 0, 80, 80, 50 * 30 + 50 * 51 // 2, 2)
    assert shapes[2] == StepShape(2, 2, 82, 162, 162, 2)
    assert shapes[3] == StepShape(2, 2, 84, 164, 164, 2)


def test_step_shape_of_a_rollout_taken_up_again():
    """Guards the cost of recomputing: the chunk's rows, and the logits of its last one."""
    scheduler = Scheduler(100, 8, POLICIES["fcfs"](), max_running=8, token_budget=64)
    prompt = Segment(16)
    group = Group([prompt], 0, Sampling(100), need=1)
    rollout = Rollout(group, 0, 0, 100)
    prompt.node = scheduler.tree.add()
    scheduler.tree.append(prompt.node, 16)
    rollout.node = scheduler.tree.add(prompt.node)
    scheduler.tree.append(rollout.node, 9)
    batch = Batch((), (Chunk(rollout, 4, 9, samples=True),))
    pairs = sum(16 + position + 1 for position in range(4, 9))
    assert step_shape(scheduler.tree, batch) == StepShape(5, 1, 25, 25, pairs, 2)


def test_usage_counts_what_steps_moved():
    """Guards MBU: bytes of a lone rollout are its weights and its KV, step by step."""
    work = StepWork(TINY.decoder)
    problem = SimProblem(0.0, 0, 1, ((5,),))
    result = simulate([problem], replace(SMALL, cost=RooflineCost(work, MACHINE)))
    shapes = [StepShape(1, 1, tokens, tokens, tokens) for tokens in range(1, 6)]
    assert result.usages[0].bytes == sum(map(work.bytes, shapes))
    assert result.usages[0].flops == sum(map(work.flops, shapes))
    assert result.usages[0].bytes_saved == 0


@pytest.mark.parametrize("num_pages", [None, 80])
@pytest.mark.parametrize("policy", ["later-round-first", "shortest-expected", "fcfs"])
def test_the_engine_itself_on_the_virtual_clock(policy: str, num_pages: int | None):
    """Step by step, by the loop that runs models, rollouts end when the simulator says: it skips
    steps, and does its own bookkeeping of rounds, to the same end."""
    setting = replace(SMALL, policy=policy, num_pages=num_pages)
    work = problems(6)
    executor = SimExecutor(
        setting.cost_model(),
        num_pages=setting.pages(),
        page_size=setting.page_size,
        max_running=setting.max_running,
    )
    vocabulary = SimpleNamespace(token_bytes=lambda id: b"")
    engine = Engine(
        executor, Stopping(vocabulary, ()), policy=policy, token_budget=setting.token_budget
    )
    images = [Segment(problem.image_tokens) for problem in work]
    for image in images:
        engine.scheduler.keep(image)

    def submit(number: int, turn: int, ended: list[int] | None = None) -> None:
        problem = work[number]
        path = [images[number], Segment(problem.prompt_tokens(ended) - 1)]
        lengths = dict(enumerate(problem.lengths[turn]))
        sampling = Sampling(setting.max_tokens, ignore_eos=True)
        seeds = dict.fromkeys(lengths, 0)
        engine.submit(path, 0, seeds, sampling, problem=number, round=turn, lengths=lengths)

    for number in range(len(work)):
        submit(number, 0)
    ends: dict[tuple[int, int, int], list[float]] = {}
    while engine.busy:
        for rollout in engine.step():
            group = rollout.group
            key = group.problem, group.round, len(rollout.tokens)
            ends.setdefault(key, []).append(executor.clock)
            if group.ended == group.need:
                if group.round < 2:
                    submit(group.problem, group.round + 1, work[group.problem].lengths[group.round])
                else:
                    engine.scheduler.drop(images[group.problem])
    simulated = ends_of(simulate(work, setting))
    assert ends.keys() == simulated.keys()
    for key, times in simulated.items():
        assert ends[key] == pytest.approx(times, rel=1e-9), key
