"""CUDA graphs of decode steps: which are captured, how they are filled, and on a GPU their results.

Without a GPU, a graph's body stands in for it and runs again at each replay: over the same padded
plan and tables, in Triton's interpreter.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.runtime.configs import use_config
from model.impls import impl_per_op
from model.step3vl import Step3VL
from pacore_sched.engine import decode_graph
from pacore_sched.engine.decode_graph import default_buckets
from pacore_sched.engine.decode_step import capturable
from pacore_sched.engine.executor import ModelExecutor
from pacore_sched.sched.request import Batch, Sampling, Segment
from pacore_sched.sched.step_batch import build_step_batch
from tests.pacore_sched.engine.test_executor import (
    GREEDY,
    OTHER,
    PROMPT,
    TOY,
    ManualEngine,
    assume_gpu,
    check,
)


class Recorded:
    """Behaves like a CUDA graph for its caller, on any device: its output is one reused buffer."""

    captured, replays = 0, 0

    def __init__(self, body: Callable[[], Tensor], device: torch.device, pool: object) -> None:
        self.body, self.output = body, body()
        Recorded.captured += 1

    def replay(self) -> Tensor:
        Recorded.replays += 1
        return self.output.copy_(self.body())


def counts() -> tuple[int, int]:
    return Recorded.captured, Recorded.replays


@pytest.fixture(scope="module")
def plain() -> Step3VL:
    return Step3VL.from_preset("tiny", seed=1)


@pytest.fixture
def engine(interpreter: None) -> Iterator[ManualEngine]:
    """An executor with recorded graphs of 2 and 4 rows."""
    Recorded.captured = Recorded.replays = 0
    model = Step3VL.from_preset("tiny", seed=1, impl={"prefix_attention": "triton"})
    engine = ManualEngine(model, max_running=4, buckets=(4, 2))
    engine.executor.graphs.enabled, engine.executor.graphs.capture = True, Recorded
    with assume_gpu(TOY), use_config("prefix_attention", programs=1):
        yield engine


def prompt(engine: ManualEngine, ids: list[int]) -> Segment:
    """A prompt written by plain PyTorch, which is faster than the interpreter."""
    engine.model.set_impl("eager")
    segment = engine.prompt(ids)
    engine.model.set_impl({"prefix_attention": "triton"})
    return segment


def test_graphs_are_refilled_when_membership_changes(engine: ManualEngine, plain: Step3VL):
    """Rollouts start and end while graphs stay: each replay computes the rollouts that run
    by then."""
    first = engine.group(prompt(engine, OTHER), 9, [1, 2, 3])
    engine.decode(first, 2, ahead=True)
    assert counts() == (1, 2)
    engine.stop(first[1])
    second = engine.group(prompt(engine, PROMPT), 7, [4, 5])
    engine.decode([second[1], first[2], second[0], first[0]], 2, ahead=True)
    assert counts() == (1, 4)
    engine.decode([second[0]], 1)
    engine.decode([first[0]], 1)
    engine.decode([first[0], second[0]], 1)
    assert counts() == (2, 7)
    check(plain, OTHER, *first)
    check(plain, PROMPT, *second)
    stats = engine.executor.stats
    assert (stats.rows, stats.padding_rows) == (len(OTHER) + len(PROMPT) + 18, 2 * 1 + 2)


def test_graphs_are_refilled_when_pages_are_full(engine: ManualEngine, plain: Step3VL):
    """The host refills the plan when pages are full, and only then."""
    rollouts = engine.group(prompt(engine, OTHER), 9, [1, 2])
    engine.model.set_impl("eager")
    engine.executor.graphs.enabled = False
    engine.decode(rollouts, 62)
    engine.executor.graphs.enabled = True
    engine.model.set_impl({"prefix_attention": "triton"})
    before = engine.executor.stats.plans
    engine.decode(rollouts, 4, ahead=True)
    assert engine.executor.stats.plans == before + 2
    assert counts() == (1, 4)
    check(plain, OTHER, *rollouts)


def test_one_graph_for_each_sampling_key(engine: ManualEngine, plain: Step3VL):
    """Sampling parameters are captured; a batch that mixes them runs without graphs, and so do
    drafts."""
    segment = prompt(engine, OTHER)
    (warm,) = engine.group(segment, 9, [1])
    (cold,) = engine.group(segment, 9, [2], GREEDY)
    engine.decode([warm], 1)
    engine.decode([cold], 1)
    engine.decode([warm], 1)
    assert counts() == (2, 3)
    (certain,) = engine.group(segment, 9, [2], replace(GREEDY, logprobs="processed"))
    engine.decode([certain], 1)
    assert counts() == (3, 4)
    assert certain.tokens == cold.tokens and certain.logprobs == [0.0] != cold.logprobs
    engine.decode([warm, cold], 1)
    batch, pending = engine.launch(Batch((cold,), drafts=((5,),)))
    cold.tokens.append(engine.executor.collect(pending)[0][0])
    cold.logprobs.append(0.0)
    assert counts() == (3, 4)
    check(plain, OTHER, warm, cold)


def test_alternatives_need_no_graph(engine: ManualEngine, plain: Step3VL):
    """A captured step has no room for alternatives: they would be missing from its results."""
    segment = prompt(engine, OTHER)
    (warm,) = engine.group(segment, 9, [1])
    (asking,) = engine.group(segment, 9, [2], Sampling(top_logprobs=2))
    engine.decode([warm, asking], 1)
    batch, pending = engine.launch(Batch((asking,)))
    tokens, _, top = engine.executor.collect(pending)
    asking.tokens += tokens
    asking.logprobs.append(0.0)
    assert counts() == (0, 0) and [len(row) for row in top] == [2]
    engine.decode([warm], 1)
    assert counts() == (1, 1)
    check(plain, OTHER, warm, asking)


def test_new_impls_and_weights(engine: ManualEngine):
    """A graph replays the kernels that it was captured with, over the weights of that time."""
    rollouts = engine.group(prompt(engine, OTHER), 9, [1])
    engine.decode(rollouts, 1)
    engine.model.impl["rms_norm"] = "eager"
    engine.decode(rollouts, 1)
    assert counts() == (2, 2)
    engine.executor.graphs.clear()
    engine.decode(rollouts, 1)
    assert counts() == (3, 3)


def test_failed_capture_falls_back_to_plain_steps(engine: ManualEngine, plain: Step3VL):
    """After a failed capture: one warning, the right tokens, and no second attempt."""
    pools = []

    def fail(body: object, device: object, pool: object) -> None:
        pools.append(pool)
        raise RuntimeError("operation not permitted when stream is capturing")

    engine.executor.graphs.capture = fail
    rollouts = engine.group(prompt(engine, OTHER), 9, [1])
    with pytest.warns(UserWarning, match="without CUDA graphs: operation not permitted"):
        engine.decode(rollouts, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        engine.decode(rollouts, 2)
    assert len(pools) == 1
    check(plain, OTHER, *rollouts)


@pytest.mark.parametrize(
    ("device", "impl", "expected"),
    [
        ("cuda", None, True),
        ("cuda", "triton", True),
        ("cuda", {"rms_norm": "eager"}, True),
        ("cuda", "eager", False),
        ("cuda", "portable", False),
        ("cuda", {"prefix_attention": "eager"}, False),
        ("cuda", {"sample": "eager"}, False),
        ("cpu", None, False),
    ],
)
def test_capturable_depends_on_impls(device: str, impl: object, expected: bool):
    """Guards against capturing eager models on a GPU: they wait for the device, and a failed
    capture breaks the process's allocator, so that the fast form gets no graphs either."""
    model = SimpleNamespace(device=torch.device(device), impl=impl_per_op(impl))
    assert capturable(model) == expected


def test_an_eager_model_on_a_gpu_is_not_captured(
    engine: ManualEngine, monkeypatch: pytest.MonkeyPatch
):
    """With `enabled` None, DecodeGraphs must ask `capturable` before it captures."""
    monkeypatch.setattr(decode_graph, "capturable", lambda model: model.impl["sample"] != "eager")
    engine.executor.graphs.enabled = None
    rollouts = engine.group(prompt(engine, OTHER), 9, [1])
    engine.model.set_impl("eager")
    engine.decode(rollouts, 1)
    assert counts() == (0, 0)
    engine.model.set_impl({"prefix_attention": "triton"})
    engine.decode(rollouts, 1)
    assert counts() == (1, 1)


def test_capacities(engine: ManualEngine):
    """Row limits follow the largest node, and deep paths get the room that they need."""
    graphs = engine.executor.graphs
    graphs.buckets = [16, 32]
    segment = prompt(engine, OTHER)
    for _ in range(3):
        segment.node = engine.tree.add(segment.node)
        engine.tree.append(segment.node, 2)
    engine.free_indices = list(range(32))
    rollouts = engine.group(segment, 9, range(20))
    work = [(rollout.node, 1) for rollout in rollouts]
    for rollout in rollouts:
        engine.tree.append(rollout.node, 1)
    group = graphs._group
    for count, rows in ((1, 16), (16, 16), (17, 32)):
        step = build_step_batch(engine.tree, work[:count])
        tiles = [tile for tile in (16 // group, 64 // group) if count <= tile < rows]
        capacity = graphs._capacity(step)
        assert (capacity.rows, capacity.max_node_rows) == (rows, min([*tiles, rows]))
        assert capacity.levels == 5


def test_buckets():
    """Every number of rows fits a bucket, with less than eight rows of padding."""
    assert default_buckets(1) == (8,)
    assert default_buckets(30) == (1, 2, 4, 8, 16, 24, 32)
    for max_running in (3, 8, 100):
        buckets = default_buckets(max_running)
        for rows in range(1, max_running + 1):
            assert min(b for b in buckets if b >= rows) - rows < 8


def padded_to_8_rows(linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`linear` that pads x to at least 8 rows.

    For another number of rows, cuBLAS may choose another kernel with another order of summation: a
    row's bits would depend on the padding of its step.
    """

    def padded(x: Tensor, *weights: Tensor) -> Tensor:
        return linear(F.pad(x, (0, 0, 0, max(0, 8 - len(x)))), *weights)[: len(x)]

    return padded


def test_products_of_8_rows(plain: Step3VL, monkeypatch: pytest.MonkeyPatch):
    """Guards the comparison on a GPU: every matrix product of a decode step must have 8 rows."""
    rows, linear = [], F.linear

    def spy(x: Tensor, *weights: Tensor) -> Tensor:
        rows.append(len(x))
        return linear(x, *weights)

    monkeypatch.setattr(F, "linear", padded_to_8_rows(spy))
    monkeypatch.setitem(plain.impl, "linear", "eager")
    engine = ManualEngine(plain)
    rollouts = engine.group(engine.prompt(OTHER), 9, [1, 2, 3])
    assert len(OTHER) in rows
    rows.clear()
    engine.decode(rollouts, 2)
    assert set(rows) == {8}
    monkeypatch.setattr(F, "linear", linear)
    check(plain, OTHER, *rollouts)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_graphs_on_a_gpu(
    dtype: torch.dtype, kv_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
):
    """Graphs give the tokens and log-probabilities of plain steps: across changes of membership and
    pages, and after freed memory was overwritten."""
    monkeypatch.setattr(F, "linear", padded_to_8_rows(F.linear))
    model = Step3VL.from_preset("tiny", seed=1, device="cuda", dtype=dtype)
    results = []
    for enabled in (False, True):
        engine = ManualEngine(model, kv_dtype=kv_dtype, buckets=(2, 4, 8))
        engine.executor.graphs.enabled = enabled
        first = engine.group(engine.prompt(OTHER), 9, [1, 2, 3])
        engine.decode(first, 70, ahead=True)
        second = engine.group(engine.prompt(PROMPT), 7, [4, 5, 6], Sampling(top_p=0.9))
        engine.stop(first[1])
        engine.decode([*second, first[0]], 5, ahead=True)
        torch.full((2**28,), torch.nan, device="cuda")
        engine.decode([first[2], first[0]], 66, ahead=True)
        engine.decode(second, 66, ahead=True)
        results.append([(r.tokens, r.logprobs) for r in (*first, *second)])
        stats = engine.executor.stats
        assert stats.device_s > 0 and stats.idle_s >= 0
        assert (len(engine.executor.graphs._graphs) > 0) == enabled
        assert (stats.padding_rows > 0) == enabled
        assert stats.plans < 20
    for (tokens, logprobs), (graph_tokens, graph_logprobs) in zip(*results, strict=True):
        assert tokens == graph_tokens
        assert logprobs == pytest.approx(graph_logprobs, abs=1e-2)


@pytest.mark.gpu
def test_no_synchronisation_on_a_gpu():
    """Launching, refilling graphs and moving pages must not wait for the device."""
    model = Step3VL.from_preset("tiny", seed=1, device="cuda", dtype=torch.bfloat16)
    with ModelExecutor(model, num_pages=40, max_running=8) as executor:
        engine = ManualEngine(model)
        engine.executor = executor
        rollouts = engine.group(engine.prompt(OTHER), 9, [1, 2, 3])
        engine.decode(rollouts, 2)
        engine.decode(rollouts[:2], 2)  # captures, compiles
        segment = executor.segment(PROMPT)
        torch.cuda.set_sync_debug_mode("error")
        try:
            launched = [engine.launch(Batch((), (engine.write(segment, 40),)))]
            launched += [engine.launch(Batch(tuple(rollouts), (engine.write(segment, 30),)))]
            launched += [engine.launch(Batch(tuple(rollouts))) for _ in range(3)]
            pages = engine.tree.pages(rollouts[0].node)
            copies = executor.cache.to_host(pages)
            executor.cache.from_host(copies, pages)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for step in launched:
            engine.collect(step)
