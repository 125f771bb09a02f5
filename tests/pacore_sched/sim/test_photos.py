"""Simulated requests with images: their times by hand, the vision budget, and the closed loop."""

from dataclasses import replace
from math import inf

import numpy as np
import pytest

from model.config import TINY
from pacore_sched.sched.view_queue import VISION_BUDGETS
from pacore_sched.sim.cluster import simulate
from pacore_sched.sim.cost_model import StepShape
from pacore_sched.sim.metrics import critical_path_s, metrics_row
from pacore_sched.sim.simulator import Replica
from pacore_sched.sim.vision.encoder import SimEncoder
from pacore_sched.sim.workload import SimProblem, photo_requests
from tests.pacore_sched.sim.test_simulator import MACHINE, PHOTOS, SMALL, TIGHT, problems


def requests(count, seed=0, tokens=80):
    """Single rollouts over two images that arrive together."""
    lengths = np.random.default_rng(seed).integers(1, tokens, count).tolist()
    return [SimProblem(0.0, 20, 9, ((length,),), photos=PHOTOS) for length in lengths]


def test_a_problem_alone_by_hand():
    """A first token that does not wait for its images, or images that later rounds encode again."""
    cost, encoder = SMALL.cost_model(), SMALL.encoder()
    problem = SimProblem(0.0, 20, 12, ((7, 5), (3,)), photos=PHOTOS)
    result = simulate([problem], SMALL)
    image = cost.seconds(StepShape(20, 0, 20, 20, 20 * 21 // 2, 1))
    question = cost.seconds(StepShape(11, 0, 31, 31, 11 * 20 + 11 * 12 // 2, 2))
    first = cost.seconds(StepShape(2, 2, 31 + 2, 2 * 32, 2 * 32))
    encoded = encoder.alone_s(PHOTOS)
    assert encoded > 0.5 * (image + question)
    expected = encoded + image + question + first
    assert result.records[0].first_s == pytest.approx(expected, rel=1e-9)
    # The second, smaller image comes first, and is a batch of its own.
    batches = [encoder.cost.seconds(encoder.cost.work.views(photo)) for photo in PHOTOS]
    assert result.usages[0].tower_s == pytest.approx(sum(batches), rel=1e-9)
    used = metrics_row(result, "w", 0)
    idle_s = encoded - sum(batches)  # while the host reads the images
    assert used["gpu_idle"] * used["makespan_s"] == pytest.approx(idle_s, rel=1e-6)


@pytest.mark.parametrize("budget", VISION_BUDGETS)
def test_a_step_is_slowed_within_the_budget(budget):
    """A decode step that encoding slows by more than the budget, or a budget that is not used."""
    setting = replace(SMALL, vision_budget=budget, concurrency=8)
    result = simulate(requests(30), setting)
    usage, slowdown = result.usages[0], VISION_BUDGETS[budget]
    slowed = np.frombuffer(usage.gap_s) / np.frombuffer(usage.alone_s)
    assert slowed.min() >= 1 - 1e-9
    if slowdown < inf:
        assert slowed.max() == pytest.approx(slowdown)
    else:  # no step waits for more than one batch
        encoder = setting.encoder()
        batch = encoder.cost.seconds([8**2] * 2 * 30 + [12**2] * 2 * 30)
        assert slowed.max() > 3
        assert np.max(np.frombuffer(usage.gap_s) - np.frombuffer(usage.alone_s)) < batch + 1e-9
    row = metrics_row(result, "w", 0)
    assert sum(row[f"gpu_{part}"] for part in ("tower", "prefill", "decode", "idle")) == (
        pytest.approx(1)
    )


def test_overlap(monkeypatch):
    """A GPU that takes turns although the machine says that a step and encoding overlap."""
    plain = replace(SMALL, max_running=6)
    full = replace(plain, machine=replace(MACHINE, overlap=1.0))
    turns, together = (simulate(requests(30), setting) for setting in (plain, full))
    assert max(together.answered_s) < max(turns.answered_s)
    usage = together.usages[0]  # encoding is never longer than the step that it is beside
    assert np.frombuffer(usage.gap_s) == pytest.approx(np.frombuffer(usage.alone_s))


def test_a_text_only_model_encodes_nothing():
    """Images that cost time, or columns about them, if the model has no tower."""
    text_only = replace(SMALL, config=replace(TINY, vision=None))
    result = simulate(requests(5), text_only)
    assert result.usages[0].tower_s == 0
    assert "gpu_tower" not in metrics_row(result, "w", 0)
    plain = simulate([replace(request, photos=()) for request in requests(5)], SMALL)
    assert result.records == plain.records


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_a_text_request_does_not_wait_for_images(share):
    """A request without images that is only taken when the host or the tower has done its work."""
    encoded = SMALL.encoder().alone_s(PHOTOS)
    text = SimProblem(share * encoded, 0, 10, ((1,),))
    record, _ = sorted(simulate([*requests(1), text], SMALL).records, key=lambda r: -r.problem)
    assert record.submitted_s == text.arrival_s
    cost = SMALL.cost_model()
    alone = cost.seconds(StepShape(9, 0, 9, 9, 45, 1)) + cost.seconds(StepShape(1, 1, 10, 10, 10))
    assert alone <= record.first_s - record.submitted_s <= 2 * alone * (1 + 1e-9)


@pytest.mark.parametrize("gpus", [1, 2])
def test_closed_loop(gpus):
    """More requests in progress than --concurrency, or fewer while there are more to come."""
    setting = replace(SMALL, concurrency=4, gpus=gpus)
    result = simulate(requests(25), setting)
    arrivals, ended = sorted(result.arrivals), sorted(result.answered_s)
    assert arrivals == [0.0] * 4 + ended[:-4]
    for record in result.records:
        assert record.submitted_s >= result.arrivals[record.problem]
        assert gpus > 1 or record.submitted_s == result.arrivals[record.problem]
    row = metrics_row(result, "w", 0)
    assert row["concurrency"] == 4
    assert row["requests_per_s"] == pytest.approx(25 / ended[-1])
    assert row["tta_mean_s"] < ended[-1] / 4
    waits = [r.first_s - result.arrivals[r.problem] for r in result.records]
    assert row["request_ttft_mean_s"] == pytest.approx(np.mean(waits))


def test_a_closed_loop_ignores_the_times_of_a_trace():
    """A request that waits for its time of day while others are answered, and keeps them back."""
    problems = requests(6)
    late = [replace(problem, arrival_s=100.0 * i) for i, problem in enumerate(problems)]
    setting = replace(SMALL, concurrency=2)
    assert simulate(late, setting).answered_s == simulate(problems, setting).answered_s


@pytest.mark.parametrize("gpus", [2, 3])
def test_a_closed_loop_in_order_of_arrival(monkeypatch, gpus):
    """GPUs whose clocks differ: a request that waits behind one that arrives after it."""
    submit, order = Replica.submit, []

    def noted(replica, number, problem):
        order.append(number)
        submit(replica, number, problem)

    monkeypatch.setattr(Replica, "submit", noted)
    arrivals = simulate(requests(40), replace(SMALL, concurrency=gpus, gpus=gpus)).arrivals
    times = [arrivals[number] for number in order]
    assert times == sorted(times)


def test_inter_token_latency_against_single_tokens(monkeypatch):
    """Percentiles of other times than those between the tokens of a rollout."""
    step, times = Replica.step, {}

    def watched_step(replica, until):
        before = {rollout: rollout.scheduled for rollout in replica.records}
        more = step(replica, replica.executor.clock if replica.scheduler.running else until)
        for rollout, tokens in before.items():
            assert rollout.scheduled <= tokens + 1
            if rollout.scheduled > tokens:
                times.setdefault(rollout, []).append(replica.executor.clock)
        return more

    monkeypatch.setattr(Replica, "step", watched_step)
    result = simulate(requests(30, tokens=20), replace(SMALL, max_running=6))
    assert result.preemptions == 0
    gaps = np.concatenate([np.diff(ends) for ends in times.values()])
    row = metrics_row(result, "w", 0)
    assert row["itl_p99_s"] == pytest.approx(np.percentile(gaps, 99, method="inverted_cdf"))
    assert sum(result.usages[0].gaps) == len(gaps)
    assert row["itl_p99_s"] == pytest.approx(2 * row["itl_alone_p99_s"], rel=0.2)
    first = [record.first_s for record in result.records]
    assert sorted(ends[0] for ends in times.values()) == sorted(first)
    assert row["request_ttft_p99_s"] == pytest.approx(np.percentile(first, 99))


def test_prefill_share():
    """Time of prompts that counts as decoding, or the reverse, where a step does both."""
    result = simulate(problems(4), SMALL)
    cost, usage = SMALL.cost_model(), result.usages[0]
    assert usage.tower_s == 0
    alone = simulate([SimProblem(0.0, 20, 12, ((1,),))], SMALL).usages[0]
    decode = cost.seconds(StepShape(1, 1, 32, 32, 32, 2))
    assert alone.prefill_s == pytest.approx(alone.ends[-1] - decode)
    steps_s = sum(usage.ends) - sum(usage.starts)
    assert 0.05 * steps_s < usage.prefill_s < 0.95 * steps_s
    wide = replace(SMALL, token_budget=4096)  # one step writes all prompts
    both = simulate([SimProblem(0.0, 0, 40, ((20,),)), SimProblem(1e-9, 0, 40, ((20,),))], wide)
    shape = StepShape(1, 1, 39 + 2, 39 + 2, 39 + 2, 1)
    mixed = StepShape(40, 1, 41 + 39, 41 + 39, 41 + 39 * 40 // 2, 2)
    first = cost.seconds(StepShape(39, 0, 39, 39, 39 * 40 // 2, 1))
    second = [first, cost.seconds(mixed) - cost.seconds(shape)]
    assert both.usages[0].prefill_s in (pytest.approx(2 * first), pytest.approx(sum(second)))


def test_moved_rollouts_encode_their_images_again(monkeypatch):
    """A rollout whose prompt another GPU prefills before it has encoded the images."""
    encoders: dict[int, SimEncoder] = {}
    submit = SimEncoder.submit

    def watched(encoder, problem, photos, clock):
        ready = submit(encoder, problem, photos, clock)
        if not ready():
            encoders[id(encoder), problem] = encoder
        return ready

    monkeypatch.setattr(SimEncoder, "submit", watched)
    work = problems(5, photos=PHOTOS)
    setting = replace(TIGHT, gpus=3, move_period_s=0.0)
    result = simulate(work, setting)
    assert result.moved_rollouts
    assert len(encoders) > len(work)
    cost = setting.encoder().cost
    batches = sum(cost.seconds(cost.work.views(photo)) for photo in PHOTOS)
    tower = sum(usage.tower_s for usage in result.usages)
    overhead = len(encoders) * MACHINE.overhead_s
    assert tower == pytest.approx(len(encoders) * batches, rel=0.05, abs=overhead)


def test_critical_path():
    """A lower bound of the makespan that leaves out the images."""
    work = requests(1)
    without = critical_path_s([replace(work[0], photos=())], SMALL)
    encoded = SMALL.encoder().alone_s(PHOTOS)
    assert critical_path_s(work, SMALL) == pytest.approx(without + encoded, rel=1e-9)


def test_photo_requests():
    """Lengths that are not uniform from 1 to 1,024, or other requests than were published."""
    work = photo_requests(4000, 0, [0.0] * 4000)
    lengths = np.array([problem.lengths[0][0] for problem in work])
    assert (lengths.min(), lengths.max()) == (1, 1024)
    assert abs(lengths.mean() - 512.5) < 4 * 1024 / np.sqrt(12 * 4000)
    assert np.histogram(lengths, 4, (0.5, 1024.5))[0] == pytest.approx(1000, rel=0.1)
    assert work[0].image_tokens + work[0].question_tokens == 2 * 670 + 128
    assert len({problem.lengths for problem in photo_requests(50, 1, [0.0] * 50)}) > 40
