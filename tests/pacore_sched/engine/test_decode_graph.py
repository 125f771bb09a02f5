"""Graphs of decode steps: which are captured, how they are filled; on a GPU, that they compute.

Without a GPU a graph is stood in for by its body, run anew at each replay: over the same padded
plan and tables, by Triton's interpreter.
"""

import warnings
from collections.abc import Callable, Iterator
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
    Hand,
    assume_gpu,
    check,
)


class Recorded:
    """What a CUDA graph is to its caller, on any device: its output is one reused buffer."""

    made, replays = 0, 0

    def __init__(self, body: Callable[[], Tensor], device: torch.device, pool: object) -> None:
        self.body, self.output = body, body()
        Recorded.made += 1

    def replay(self) -> Tensor:
        Recorded.replays += 1
        return self.output.copy_(self.body())


def counts() -> tuple[int, int]:
    return Recorded.made, Recorded.replays


@pytest.fixture(scope="module")
def plain() -> Step3VL:
    return Step3VL.from_preset("tiny", seed=1)


@pytest.fixture
def hand(interpreter: None) -> Iterator[Hand]:
    """An executor with recorded graphs of 2 and 4 rows."""
    Recorded.made = Recorded.replays = 0
    model = Step3VL.from_preset("tiny", seed=1, impl={"prefix_attention": "triton"})
    hand = Hand(model, max_running=4, buckets=(4, 2))
    hand.executor.graphs.enabled, hand.executor.graphs.capture = True, Recorded
    with assume_gpu(TOY), use_config("prefix_attention", programs=1):
        yield hand


def prompt(hand: Hand, ids: list[int]) -> Segment:
    """Written by plain PyTorch, which is quicker than the interpreter."""
    hand.model.set_impl("eager")
    segment = hand.prompt(ids)
    hand.model.set_impl({"prefix_attention": "triton"})
    return segment


def test_filled_anew_when_membership_changes(hand: Hand, plain: Step3VL):
    """Rollouts come and go under graphs that stay: each replay is for whoever runs by then."""
    first = hand.group(prompt(hand, OTHER), 9, [1, 2, 3])
    hand.decode(first, 2, ahead=True)
    assert counts() == (1, 2)
    hand.stop(first[1])
    second = hand.group(prompt(hand, PROMPT), 7, [4, 5])
    hand.decode([second[1], first[2], second[0], first[0]], 2, ahead=True)
    assert counts() == (1, 4)
    hand.decode([second[0]], 1)
    hand.decode([first[0]], 1)
    hand.decode([first[0], second[0]], 1)
    assert counts() == (2, 7)
    check(plain, OTHER, *first)
    check(plain, PROMPT, *second)
    stats = hand.executor.stats
    assert (stats.rows, stats.padding_rows) == (len(OTHER) + len(PROMPT) + 18, 2 * 1 + 2)


def test_a_page_turns_under_a_graph(hand: Hand, plain: Step3VL):
    """The host fills the plan anew when pages are full, and only then."""
    rollouts = hand.group(prompt(hand, OTHER), 9, [1, 2])
    hand.model.set_impl("eager")
    hand.executor.graphs.enabled = False
    hand.decode(rollouts, 62)
    hand.executor.graphs.enabled = True
    hand.model.set_impl({"prefix_attention": "triton"})
    before = hand.executor.stats.plans
    hand.decode(rollouts, 4, ahead=True)
    assert hand.executor.stats.plans == before + 2
    assert counts() == (1, 4)
    check(plain, OTHER, *rollouts)


def test_one_graph_for_each_way_to_draw(hand: Hand, plain: Step3VL):
    """Temperatures are captured; a batch that mixes them runs plainly, and so do drafts."""
    above = prompt(hand, OTHER)
    (warm,) = hand.group(above, 9, [1])
    (cold,) = hand.group(above, 9, [2], GREEDY)
    hand.decode([warm], 1)
    hand.decode([cold], 1)
    hand.decode([warm], 1)
    assert counts() == (2, 3)
    hand.decode([warm, cold], 1)
    batch, pending = hand.launch(Batch((cold,), drafts=((5,),)))
    cold.tokens.append(hand.executor.collect(pending)[0][0])
    cold.logprobs.append(0.0)
    assert counts() == (2, 3)
    check(plain, OTHER, warm, cold)


def test_new_forms_and_weights(hand: Hand):
    """A graph replays the kernels that it was captured with, over the weights that were there."""
    rollouts = hand.group(prompt(hand, OTHER), 9, [1])
    hand.decode(rollouts, 1)
    hand.model.impl["rms_norm"] = "eager"
    hand.decode(rollouts, 1)
    assert counts() == (2, 2)
    hand.executor.graphs.clear()
    hand.decode(rollouts, 1)
    assert counts() == (3, 3)


def test_what_cannot_be_captured_runs_plainly(hand: Hand, plain: Step3VL):
    """One warning, the right tokens, and no second try."""
    tries = []

    def fail(body: object, device: object, pool: object) -> None:
        tries.append(pool)
        raise RuntimeError("operation not permitted when stream is capturing")

    hand.executor.graphs.capture = fail
    rollouts = hand.group(prompt(hand, OTHER), 9, [1])
    with pytest.warns(UserWarning, match="without CUDA graphs: operation not permitted"):
        hand.decode(rollouts, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        hand.decode(rollouts, 2)
    assert len(tries) == 1
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
def test_captured_by_form_not_by_device(device: str, impl: object, expected: bool):
    """Guards eager models on a GPU: they wait for the device, and a capture that fails breaks the
    allocator of the process, so that the fast form gets no graphs either."""
    model = SimpleNamespace(device=torch.device(device), impl=impl_per_op(impl))
    assert capturable(model) == expected


def test_an_eager_model_on_a_gpu_is_not_captured(hand: Hand, monkeypatch: pytest.MonkeyPatch):
    """Guards the question itself: graphs left to themselves ask the form before they capture."""
    monkeypatch.setattr(decode_graph, "capturable", lambda model: model.impl["sample"] != "eager")
    hand.executor.graphs.enabled = None
    rollouts = hand.group(prompt(hand, OTHER), 9, [1])
    hand.model.set_impl("eager")
    hand.decode(rollouts, 1)
    assert counts() == (0, 0)
    hand.model.set_impl({"prefix_attention": "triton"})
    hand.decode(rollouts, 1)
    assert counts() == (1, 1)


def test_capacities(hand: Hand):
    """Row tiles follow the largest node, deep paths get the room that they need."""
    graphs = hand.executor.graphs
    graphs.buckets = [16, 32]
    above = prompt(hand, OTHER)
    for _ in range(3):
        above.node = hand.tree.add(above.node)
        hand.tree.append(above.node, 2)
    hand.free_indices = list(range(32))
    rollouts = hand.group(above, 9, range(20))
    one = [(rollout.node, 1) for rollout in rollouts]
    for rollout in rollouts:
        hand.tree.append(rollout.node, 1)
    group = graphs._group
    for count, rows in ((1, 16), (16, 16), (17, 32)):
        step = build_step_batch(hand.tree, one[:count])
        tiles = [tile for tile in (16 // group, 64 // group) if count <= tile < rows]
        capacity = graphs._capacity(step)
        assert (capacity.rows, capacity.most_rows) == (rows, min([*tiles, rows]))
        assert capacity.levels == 5


def test_buckets():
    """Every number of rows fits one, with less than eight rows of padding."""
    assert default_buckets(1) == (8,)
    assert default_buckets(30) == (1, 2, 4, 8, 16, 24, 32)
    for most in (3, 8, 100):
        buckets = default_buckets(most)
        for rows in range(1, most + 1):
            assert min(b for b in buckets if b >= rows) - rows < 8


def of_8_rows(linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`linear` with fewer than 8 rows of x as a product of 8.

    cuBLAS may choose another kernel for another number of rows, and that sums in another order: a
    row's bits would depend on how many rows pad its step.
    """

    def padded(x: Tensor, *weights: Tensor) -> Tensor:
        return linear(F.pad(x, (0, 0, 0, max(0, 8 - len(x)))), *weights)[: len(x)]

    return padded


def test_products_of_8_rows(plain: Step3VL, monkeypatch: pytest.MonkeyPatch):
    """Guards the comparison on a GPU: every product of a decode step has to be of 8 rows."""
    rows, linear = [], F.linear

    def spy(x: Tensor, *weights: Tensor) -> Tensor:
        rows.append(len(x))
        return linear(x, *weights)

    monkeypatch.setattr(F, "linear", of_8_rows(spy))
    hand = Hand(plain)
    rollouts = hand.group(hand.prompt(OTHER), 9, [1, 2, 3])
    assert len(OTHER) in rows
    rows.clear()
    hand.decode(rollouts, 2)
    assert set(rows) == {8}
    monkeypatch.setattr(F, "linear", linear)
    check(plain, OTHER, *rollouts)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_graphs_on_a_gpu(
    dtype: torch.dtype, kv_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
):
    """The tokens and log-probabilities of plain steps, over changes of membership and of pages,
    while images are encoded beside them, and over memory that was given back meanwhile."""
    monkeypatch.setattr(F, "linear", of_8_rows(F.linear))
    model = Step3VL.from_preset("tiny", seed=1, device="cuda", dtype=dtype)
    told = []
    for enabled in (False, True):
        hand = Hand(model, kv_dtype=kv_dtype, buckets=(2, 4, 8))
        hand.executor.graphs.enabled = enabled
        first = hand.group(hand.prompt(OTHER), 9, [1, 2, 3])
        hand.decode(first, 70, ahead=True)
        second = hand.group(hand.prompt(PROMPT), 7, [4, 5, 6], Sampling(top_p=0.9))
        hand.stop(first[1])
        hand.decode([*second, first[0]], 5, ahead=True)
        torch.full((2**28,), torch.nan, device="cuda")
        hand.decode([first[2], first[0]], 66, ahead=True)
        hand.decode(second, 66, ahead=True)
        told.append([(r.tokens, r.logprobs) for r in (*first, *second)])
        stats = hand.executor.stats
        assert stats.device_s > 0 and stats.idle_s >= 0
        assert (len(hand.executor.graphs._graphs) > 0) == enabled
        assert (stats.padding_rows > 0) == enabled
        assert stats.plans < 20
    for (tokens, logprobs), (graph_tokens, graph_logprobs) in zip(*told, strict=True):
        assert tokens == graph_tokens
        assert logprobs == pytest.approx(graph_logprobs, abs=1e-2)


@pytest.mark.gpu
def test_nobody_waits_on_a_gpu():
    """Launching, filling graphs anew and moving pages must not wait for the device."""
    model = Step3VL.from_preset("tiny", seed=1, device="cuda", dtype=torch.bfloat16)
    with ModelExecutor(model, num_pages=40, max_running=8) as executor:
        hand = Hand(model)
        hand.executor = executor
        rollouts = hand.group(hand.prompt(OTHER), 9, [1, 2, 3])
        hand.decode(rollouts, 2)
        hand.decode(rollouts[:2], 2)  # captures, compiles
        segment = executor.segment(PROMPT)
        torch.cuda.set_sync_debug_mode("error")
        try:
            launched = [hand.launch(Batch((), (hand.write(segment, 40),)))]
            launched += [hand.launch(Batch(tuple(rollouts), (hand.write(segment, 30),)))]
            launched += [hand.launch(Batch(tuple(rollouts))) for _ in range(3)]
            pages = hand.tree.pages(rollouts[0].node)
            copies = executor.cache.to_host(pages)
            executor.cache.from_host(copies, pages)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for each in launched:
            hand.collect(each)
