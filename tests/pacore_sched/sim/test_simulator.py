"""The simulator: skipping to events equals single steps, and no rollout, token or page is lost."""

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
from pacore_sched.sched.view_queue import VISION_BUDGETS
from pacore_sched.sim.cluster import Setting, simulate
from pacore_sched.sim.cost_model import RooflineCost, StepShape, StepWork
from pacore_sched.sim.executor import SimExecutor, step_shape
from pacore_sched.sim.machine import Machine
from pacore_sched.sim.simulator import Replica
from pacore_sched.sim.workload import Photo, SimProblem

# Slow enough that overhead, bytes and FLOPs are all significant at these sizes.
MACHINE = Machine("toy", copy_gb_s=10, gemm_tflop_s=0.01, memory_bytes=1e9, workspace_bytes=0)
SMALL = Setting(
    machine=MACHINE, config=TINY, max_running=24, token_budget=64, page_size=8, max_tokens=400
)
TIGHT = replace(SMALL, num_pages=80)  # 640 tokens: too few for all rollouts at once


PHOTOS = (Photo(pixels=10**6, tokens=12, crops=2), Photo(pixels=10**5, tokens=8, crops=0))


def problems(count, seed=0, widths=(5, 3), spacing=0.0, image=20, photos=()):
    """Problems with random lengths from 1 to 199 tokens."""
    rng = np.random.default_rng(seed)
    return [
        SimProblem(
            number * spacing,
            image,
            int(rng.integers(1, 40)),
            tuple(tuple(rng.integers(1, 200, width).tolist()) for width in (*widths, 1)),
            template_tokens=3,
            message_tokens=6,
            photos=photos,
        )
        for number in range(count)
    ]


def token_by_token(cost, work):
    """End times of all rollouts of problems without images, by a plain loop over single steps.

    With unlimited memory and a token budget that no step reaches, a prompt is written in one step,
    together with decoding rollouts, and its rollouts start in the next step.
    """
    clock, ends = 0.0, {}
    arriving = sorted(range(len(work)), key=lambda number: work[number].arrival_s)
    prompts, waiting, written, running = {}, [], set(), {}

    def submit(number, turn, ended=None):
        prompts[number, turn] = work[number].prompt_tokens(ended) - 1
        waiting.append((number, turn))

    while arriving or waiting or running:
        while arriving and work[arriving[0]].arrival_s <= clock:
            submit(arriving.pop(0), 0)
        if not waiting and not running:
            clock = work[arriving[0]].arrival_s
            continue
        prefill = [key for key in waiting if prompts[key] and key not in written]
        for number, turn in set(waiting) - set(prefill):
            running |= {(number, turn, i): 0 for i in range(len(work[number].lengths[turn]))}
        waiting, written = prefill, written | set(prefill)
        running = {key: tokens + 1 for key, tokens in running.items()}
        clock += cost.seconds(plain_shape(running, prompts, [prompts[key] for key in prefill]))
        for key in [key for key, tokens in running.items() if tokens == length(work, key)]:
            number, turn, _ = key
            del running[key]
            ends[key] = clock
            lengths = work[number].lengths
            complete = all((number, turn, index) in ends for index in range(len(lengths[turn])))
            if complete and turn + 1 < len(lengths):
                submit(number, turn + 1, lengths[turn])
    return ends


def length(work, key):
    number, turn, index = key
    return work[number].lengths[turn][index]


def plain_shape(running, prompts, chunks):
    """The shape of a step of running rollouts (key: tokens) and of whole prompts (`chunks`)."""
    unshared_part = sum(running.values()) + sum(chunks)
    unshared = unshared_part + sum(prompts[key[:2]] for key in running)
    shared = unshared_part + sum(prompts[key] for key in {key[:2] for key in running})
    pairs = unshared - sum(chunks) + sum(n * (n + 1) // 2 for n in chunks)
    return StepShape(len(running) + sum(chunks), len(running), shared, unshared, pairs)


def ends_of(result):
    """(problem, round, length) -> end times, ascending, of these rollouts."""
    ends = {}
    for record in result.records:
        key = record.problem, record.round, record.length
        ends[key] = sorted([*ends.get(key, []), record.ended_s])
    return ends


@pytest.mark.parametrize("shared_reads", [True, False])
@pytest.mark.parametrize("spacing", [0.0, 0.8])
def test_events_against_token_by_token(shared_reads, spacing):
    """Skipping to events that ends a rollout at another time than a loop over single steps."""
    setting = replace(
        SMALL,
        policy="fcfs",
        shared_reads=shared_reads,
        num_pages=10_000,
        max_running=300,
        token_budget=4000,
    )
    work = problems(6, spacing=spacing, image=0)
    work[0] = replace(work[0], question_tokens=1)  # no segment: it starts immediately
    expected = {}
    for key, end in token_by_token(setting.cost_model(), work).items():
        group = (*key[:2], length(work, key))
        expected[group] = sorted([*expected.get(group, []), end])
    actual = ends_of(simulate(work, setting))
    assert actual.keys() == expected.keys()
    for key, ends in expected.items():
        assert actual[key] == pytest.approx(ends, rel=1e-9)


@pytest.mark.parametrize("budget", [None, *VISION_BUDGETS])
@pytest.mark.parametrize("policy", POLICIES)
def test_skipping_changes_nothing_when_memory_is_short(policy, budget, monkeypatch):
    """Skipping to events that differs from single steps when rollouts are preempted, or while
    images come from the host and are encoded."""
    setting = replace(TIGHT, policy=policy, vision_budget=budget or "balanced")
    work = problems(6, photos=PHOTOS if budget else (), spacing=0.3 if budget else 0.0)
    skipped = simulate(work, setting)
    step = Replica.step

    def single_step(replica, until):
        return step(replica, replica.executor.clock if replica.scheduler.running else until)

    monkeypatch.setattr(Replica, "step", single_step)
    single = simulate(work, setting)
    assert skipped.preemptions == single.preemptions
    if not budget:  # memory is short
        assert skipped.preemptions or policy not in ("fcfs", "later-round-first")
    assert sum(len(usage.ends) for usage in skipped.usages) < sum(
        len(usage.ends) for usage in single.usages
    )
    for actual, expected in zip(skipped.records, single.records, strict=True):
        assert actual.ended_s == pytest.approx(expected.ended_s, rel=1e-9)
        assert actual.first_s == pytest.approx(expected.first_s, rel=1e-9)
    used, single_used = skipped.usages[0], single.usages[0]
    assert (used.bytes, used.flops, used.steps) == (
        single_used.bytes,
        single_used.flops,
        single_used.steps,
    )
    assert used.bytes_saved == single_used.bytes_saved
    assert used.tower_s == pytest.approx(single_used.tower_s, rel=1e-9)
    assert bool(used.tower_s) == bool(budget)
    assert used.prefill_s == pytest.approx(single_used.prefill_s, rel=1e-9)
    assert sum(used.gaps) == sum(single_used.gaps)


@pytest.mark.parametrize("photos", [(), PHOTOS], ids=["", "photos"])
@pytest.mark.parametrize("gpus", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_rollout_ends_once(policy, gpus, photos):
    """A lost or repeated rollout, rounds that overlap, or an answer before its last rollout."""
    work = problems(8, spacing=0.05, photos=photos)
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
    """A replica with the problems submitted, and the list of answered problems that it fills."""
    answers = []
    options = {"num_pages": 80, "page_size": 8, "max_running": 24, "token_budget": 64}
    options |= {"context": 65536}
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


def test_all_pages_are_freed():
    """A page, of an image or a rollout, that is not freed when all problems are answered."""
    replica, answers = replica_over(problems(4))
    while replica.step():
        replica.scheduler.check_integrity()
    assert sorted(answers) == [0, 1, 2, 3]
    assert replica.scheduler.tree.free_pages == 80
    assert not replica.runs


def test_an_image_is_prefilled_once_and_cancelled_rollouts_leave_no_message():
    """Prefilling an image again in later rounds, or the message of a cancelled rollout."""
    lengths = ((30, 50, 90, 130), (10,))
    problem = SimProblem(0.0, 20, 12, lengths, template_tokens=3, message_tokens=40)
    for share, messages in ((1.0, 30 + 40 + 40 + 40), (0.5, 30 + 40)):
        replica, answers = replica_over([problem], need_share=share)
        while replica.step():
            pass
        # Every prompt without its last token, which is in the leaves.
        assert replica.scheduler.counts.prefilled == 20 + 11 + (12 + 3 + messages - 1)
        assert answers == [0]


def test_runs_are_deterministic():
    """Two runs of the same problems that differ in any bit."""
    setting = replace(TIGHT, gpus=2)
    first, second = (simulate(problems(6), setting) for _ in range(2))
    assert first.records == second.records
    assert first.answered_s == second.answered_s


def test_next_round_at_a_share_of_the_rollouts():
    """A round that waits for all rollouts although a share is enough, or that cancels none."""
    work = problems(5)
    whole = simulate(work, SMALL)
    partial = simulate(work, replace(SMALL, need_share=0.6))
    rounds = {}
    for record in partial.records:
        rounds.setdefault((record.problem, record.round), []).append(record.cancelled)
    for (_, turn), cancelled in rounds.items():
        # Rollouts whose last token is in the step that ends the round are not cancelled.
        assert sum(cancelled) <= {0: 2, 1: 1, 2: 0}[turn]
    assert sum(map(sum, rounds.values())) > 5
    assert partial.cancelled_tokens > 0
    assert max(partial.answered_s) < max(whole.answered_s)


def test_more_gpus_share_the_work():
    """A queue that leaves GPUs without work."""
    work = problems(12)
    one, four = (simulate(work, replace(TIGHT, gpus=gpus)) for gpus in (1, 4))
    assert max(four.answered_s) < 0.5 * max(one.answered_s)
    assert all(len(usage.ends) > 20 for usage in four.usages)


def test_growing_into_the_watermark_does_not_change_the_batch():
    """A new batch in every step, which slows down simulator and engine, when running rollouts grow
    into the pages of the watermark."""
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
    """A clock that does not advance to the next arrival when a GPU is idle."""
    work = problems(3, spacing=1000.0)
    result = simulate(work, SMALL)
    alone = simulate([replace(work[2], arrival_s=0.0)], SMALL)
    assert result.answered_s[2] - 2000 == pytest.approx(alone.answered_s[0], rel=1e-9)


def test_what_never_fits_is_refused():
    """Waiting forever for pages that no GPU has."""
    with pytest.raises(InputError, match="does not fit"):
        simulate(problems(1), replace(SMALL, num_pages=40))
    with pytest.raises(InputError, match="no room for KV"):
        simulate(problems(1), replace(SMALL, machine=replace(MACHINE, memory_bytes=1e6)))


@pytest.mark.parametrize("limits", [{"context": 500}, {"num_pages": 64}])
def test_messages_that_do_not_fit_are_shortened(limits):
    """A synthesis that no GPU can run, which ends the simulation, or a prompt without room for an
    answer, although the engine would shorten its messages."""
    work = [replace(problem, message_tokens=150) for problem in problems(4, widths=(12,))]
    work = [replace(problem, lengths=(problem.lengths[0], (400,))) for problem in work]
    replica, answers = replica_over(work, **limits)
    groups = set()
    while replica.step():
        replica.scheduler.check_integrity()
        groups |= replica.scheduler.groups.keys()
    assert sorted(answers) == [0, 1, 2, 3]
    prompts = {group.prompt_tokens for group in groups if group.round}
    assert max(prompts) <= 64 * 8 - 400 // 2 < 12 * 64


def test_step_shape_by_hand():
    """A step charged more than once for a shared node, or not for the nodes above a chunk."""
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


def test_step_shape_of_a_resumed_rollout():
    """Recomputation that is not charged for the chunk's rows and its last row's logits."""
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
    """Bytes of a single rollout, for MBU, that differ from its weights and KV summed over steps."""
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
    """A simulator, which skips steps and tracks rounds itself, that ends rollouts at other times
    than the engine, which runs every step."""
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
