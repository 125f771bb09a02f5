"""The simulator's cost models, compared with numbers computed by hand and with plain sums."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import SMOLLM2_135M, STEP3_VL_10B, TINY
from model.errors import InputError
from model.step3vl import Step3VL
from pacore_sched.sim.calibration import (
    FittedVision,
    fit,
    fit_vision,
    nonnegative_least_squares,
)
from pacore_sched.sim.cost_model import (
    RooflineCost,
    StepShape,
    StepWork,
    kv_capacity,
    steps_until,
    sum_of_larger,
    weight_bytes,
)
from pacore_sched.sim.machine import MACHINES, find_machine
from pacore_sched.sim.vision.cost import VisionWork

WORK = StepWork(STEP3_VL_10B.decoder)
DECODE = StepShape(rows=16, sampled=16, kv_read=10_000, kv_read_unshared=40_000, pairs=40_000)


def grown(shape, steps):
    """A decode step's shape after `steps` more steps."""
    growth = shape.rows * steps
    return replace(
        shape,
        kv_read=shape.kv_read + growth,
        kv_read_unshared=shape.kv_read_unshared + growth,
        pairs=shape.pairs + growth,
    )


def test_bytes_and_flops_by_hand():
    """Wrong bytes or FLOPs, from which all simulated times of the 10B follow."""
    layer = 4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 12288
    weights = 36 * layer + 4096 * 151936
    assert WORK.linear_bytes(DECODE) == 2 * (weights + 16 * 4096)
    assert 2 * weights == 15_136_194_560
    assert WORK.linear_flops(DECODE) == 2 * 16 * weights
    assert WORK.kv_token_bytes == 147_456
    assert StepWork(STEP3_VL_10B.decoder, "fp8").kv_token_bytes == 36 * 2 * 8 * 132
    assert WORK.attention_bytes(DECODE) == 10_016 * 147_456
    assert WORK.attention_bytes(DECODE, shared_reads=False) == 40_016 * 147_456
    assert WORK.attention_flops(DECODE) == 36 * 32 * 40_000 * 2 * 2 * 128


def test_no_logits_no_vocabulary():
    """Charging prefill chunks other than the last one for logits."""
    prefill = replace(DECODE, sampled=0)
    head = 4096 * 151936
    assert WORK.linear_bytes(DECODE) - WORK.linear_bytes(prefill) == 2 * head
    assert WORK.linear_flops(DECODE) - WORK.linear_flops(prefill) == 2 * 16 * head


@pytest.mark.parametrize("shared_reads", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 63, 1000])
def test_steps_in_a_row_are_the_sum_of_steps(steps, shared_reads):
    """Closed forms, with which the simulator skips to the next event, that differ from sums."""
    shapes = [grown(DECODE, step) for step in range(steps)]
    assert WORK.bytes(DECODE, steps, shared_reads) == sum(
        WORK.bytes(shape, 1, shared_reads) for shape in shapes
    )
    assert WORK.flops(DECODE, steps) == sum(map(WORK.flops, shapes))
    cost = RooflineCost(WORK, MACHINES["h200"], shared_reads)
    assert cost.seconds(DECODE, steps) == pytest.approx(sum(map(cost.seconds, shapes)), rel=1e-12)


LINE = st.tuples(st.integers(0, 50), st.integers(0, 9))


@given(LINE, LINE, st.integers(0, 40))
def test_sum_of_larger(a, b, count):
    """A wrong sum where steps change from bytes-bound to FLOPs-bound."""
    expected = sum(max(a[0] + j * a[1], b[0] + j * b[1]) for j in range(count))
    assert sum_of_larger(a, b, count) == expected


def test_roofline_seconds_by_hand():
    """A time other than linear layers plus attention, each limited by bytes or by FLOPs."""
    machine = replace(MACHINES["h200"], overhead_s=0.001)
    cost = RooflineCost(WORK, machine)
    bandwidth = 4800e9 * 0.90 * 0.90
    rate = 989e12 * 0.70
    decode = (15_136_194_560 + 16 * 8192 + 10_016 * 147_456) / bandwidth + 0.001
    assert cost.seconds(DECODE) == pytest.approx(decode, rel=1e-12)
    chunk = StepShape(rows=8192, sampled=0, kv_read=8192, kv_read_unshared=8192, pairs=30_000_000)
    linear = 2 * 8192 * (15_136_194_560 // 2 - 4096 * 151936) / (rate * 0.85)
    attention = 36 * 32 * 30_000_000 * 512 / (rate * 0.60)
    assert cost.seconds(chunk) == pytest.approx(linear + attention + 0.001, rel=1e-12)


def test_kv_capacity():
    """A KV capacity, on which every policy's gain depends, that ignores weights or workspace."""
    h200 = MACHINES["h200"]
    room = 0.9 * 141e9 - 6e9 - weight_bytes(STEP3_VL_10B)
    assert kv_capacity(STEP3_VL_10B, h200) == int(room // 147_456)
    assert kv_capacity(STEP3_VL_10B, h200, "fp8") == int(room // 76_032)
    assert kv_capacity(STEP3_VL_10B, replace(h200, memory_bytes=20e9)) <= 0


def test_weight_bytes_are_those_of_the_model():
    """A count of weights that differs from the model's real layers."""
    model = Step3VL.from_preset("tiny", seed=0)
    actual = 2 * sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert weight_bytes(model.config) == pytest.approx(actual, rel=0.15)
    assert weight_bytes(STEP3_VL_10B) == pytest.approx(20.3e9, rel=0.01)


def test_steps_until():
    """Noticing an arrival in another step than the first that ends at or after it."""
    assert steps_until(lambda k: 2.0 * k, 6.0, 10) == 3
    assert steps_until(lambda k: 2.0 * k, 6.1, 10) == 4
    assert steps_until(lambda k: 2.0 * k, 0.1, 10) == 1
    assert steps_until(lambda k: 2.0 * k, 99.0, 10) == 10


def test_measured_rows_replace_assumptions(tmp_path):
    """Ceilings or decode efficiency from rows of other GPUs, dtypes or forms, or of failures."""
    rows = [
        {"op": "roofline", "dtype": "float32", "copy_gb_s": 1.0, "gemm_tflop_s": 1.0},
        {"op": "roofline", "dtype": "bfloat16", "copy_gb_s": 4200.0, "gemm_tflop_s": 700.0},
        {"op": "rms_norm", "dtype": "bfloat16", "impl": "triton", "roofline_pct": 1.0},
    ]
    step = {"op": "decode_step", "dtype": "bfloat16", "case": "step3-vl-10b B16 P2048 S512"}
    rows += [
        step | {"impl": "eager", "roofline_pct": 10.0},
        step | {"impl": "default", "roofline_pct": 84.0},
        step | {"impl": "default", "roofline_pct": 1.0, "failure": "wrong numbers"},
    ]
    folder = tmp_path / "nvidia-h200"
    folder.mkdir()
    (folder / "record.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    machine = find_machine("h200", tmp_path)
    assert machine.measured
    assert (machine.copy_gb_s, machine.gemm_tflop_s) == (4200.0, 700.0)
    assert machine.bandwidth_efficiency == 0.84
    assert machine.overhead_s == 0  # the measured step includes it
    assert find_machine("h100", tmp_path) == MACHINES["h100"]


def test_bad_machines_are_named(tmp_path):
    """An error that does not name the unknown GPU or the invalid line."""
    with pytest.raises(InputError, match="unknown GPU 'b300'.*h200"):
        find_machine("b300", tmp_path)
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "rows.jsonl").write_text('{"op": "x"}\nnonsense\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:2"):
        find_machine("h200", tmp_path)


def planted(shape):
    """Seconds of a machine whose coefficients a fit must recover: piecewise linear in rows."""
    linear = np.interp(shape.rows, [1, 8, 64], [0.02, 0.05, 0.11])
    per = 1e-4 * shape.sampled + 2e-6 * shape.kv_read + 3e-7 * shape.pairs
    return float(linear + per + 1e-3 * shape.segments)


def random_shapes(count, rng):
    for _ in range(count):
        rows = int(rng.choice([1, 8, 64]))
        read, context = int(rng.integers(100, 5000)), int(rng.integers(100, 3000))
        sampled = int(rng.integers(0, rows + 1))
        segments = int(rng.integers(0, 9))
        yield StepShape(rows, sampled, read, rows * context, rows * context, segments)


def test_fit_finds_planted_costs():
    """A fit that mispredicts steps that were not among its samples."""
    rng = np.random.default_rng(0)
    samples = [(shape, planted(shape)) for shape in random_shapes(60, rng)]
    cost = fit(samples, StepWork(SMOLLM2_135M.decoder))
    for shape in random_shapes(20, rng):
        assert cost.seconds(shape) == pytest.approx(planted(shape), rel=1e-6)
    between = StepShape(36, 0, 0, 0, 0)
    assert cost.seconds(between) == pytest.approx(0.08, rel=1e-6)
    beyond = StepShape(120, 0, 0, 0, 0)
    assert cost.seconds(beyond) == pytest.approx(0.17, rel=1e-6)
    assert cost.seconds(DECODE, 50) == pytest.approx(
        sum(cost.seconds(grown(DECODE, step)) for step in range(50)), rel=1e-12
    )


def test_fit_to_noisy_steps_predicts_their_sums():
    """Predicted sums that are too small on a noisy machine, where slow steps are much slower."""
    rng = np.random.default_rng(2)
    shapes = list(random_shapes(2000, rng))
    slow = 1 + rng.pareto(3, len(shapes)) * (rng.random(len(shapes)) < 0.3)
    seconds = np.array(list(map(planted, shapes))) * slow
    cost = fit(list(zip(shapes, seconds.tolist(), strict=True)), StepWork(SMOLLM2_135M.decoder))
    predicted, rows = np.array([(cost.seconds(shape), shape.rows) for shape in shapes]).T
    assert predicted.sum() == pytest.approx(seconds.sum(), rel=0.01)
    for count in (1, 8, 64):
        of_count = rows == count
        assert predicted[of_count].sum() == pytest.approx(seconds[of_count].sum(), rel=0.02)


def test_fit_of_noise_never_rewards_more_work():
    """Overfitting noise: negative coefficients, or steps that get faster with more rows."""
    rng = np.random.default_rng(1)
    samples = [(shape, float(rng.uniform(0.01, 0.02))) for shape in random_shapes(40, rng)]
    cost = fit(samples, StepWork(SMOLLM2_135M.decoder))
    assert min(cost.per_sampled, cost.per_kv_token, cost.per_pair, cost.per_segment) >= 0
    assert list(cost.row_seconds) == sorted(cost.row_seconds)
    assert cost.row_seconds[0] >= 0


def test_fit_needs_samples():
    """A division by zero for steps of 0 seconds."""
    with pytest.raises(ValueError, match="more than 0 seconds"):
        fit([], StepWork(SMOLLM2_135M.decoder))
    with pytest.raises(ValueError, match="more than 0 seconds"):
        fit([(DECODE, 0.0)], StepWork(SMOLLM2_135M.decoder))


@pytest.mark.parametrize("seed", range(8))
def test_nonnegative_least_squares_against_scipy(seed):
    """A wrong solution where several coefficients are fixed at 0."""
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(30, 7)), rng.normal(size=30)
    expected, _ = optimize.nnls(a, b)
    np.testing.assert_allclose(nonnegative_least_squares(a, b), expected, atol=1e-9)


def test_fit_is_fine_where_rows_are_few():
    """Knots spaced by count instead of by ratio: a step of two rows may take half as long again as
    one of a single row, but most of five hundred sizes are large."""

    def seconds(rows: int) -> float:
        return 0.08 + (0.03 if rows > 1 else 0) + 0.003 * rows

    shapes = [StepShape(rows, rows, 0, 0, 0) for rows in range(1, 513)]
    cost = fit([(shape, seconds(shape.rows)) for shape in shapes], StepWork(SMOLLM2_135M.decoder))
    for shape in shapes:
        assert cost.seconds(shape) == pytest.approx(seconds(shape.rows), rel=0.03)


def test_fit_of_the_tower():
    """Coefficients of a call, a patch or a pair of patches that are not recovered."""
    work = VisionWork(TINY.vision, TINY.decoder.hidden)
    planted_cost = FittedVision(work, 0.01, 2e-4, 3e-7)
    views = ([144], [64, 64, 144], [64] * 9, [144, 144])
    fitted = fit_vision([(v, planted_cost.seconds(v)) for v in views], work)
    assert fitted.seconds([100, 10]) == pytest.approx(0.01 + 2e-4 * 110 + 3e-7 * 10_100)
    with pytest.raises(ValueError, match="more than 0 seconds"):
        fit_vision([([144], 0.0)], work)
