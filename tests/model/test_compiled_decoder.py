"""The decoder's step through torch.compile and torch.export."""

from shutil import which
from typing import NamedTuple

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn

from kernels.kv_pages import KVPages
from kernels.plan_node import PlanNode
from kernels.prefix_plan import Capacity, PlanTensors, PrefixPlan
from model.decoder import Decoder, Step
from model.kv_cache import KVCache
from model.step3vl import Step3VL

PAGE, PAGES = 16, 8


class Pages(NamedTuple):
    """A KV cache as two tensors."""

    k: Tensor
    v: Tensor

    def layer(self, index: int) -> KVPages:
        return KVPages(self.k[index], self.v[index])


class DecodeStep(nn.Module):
    """From token ids to logits, with the cache and the plan as tensors."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, ids: Tensor, positions: Tensor, slots: Tensor, k: Tensor, v: Tensor, plan: PlanTensors
    ) -> Tensor:
        step = Step(positions, slots, plan)
        h = self.decoder(self.decoder.embed(ids), step, Pages(k, v))
        return self.decoder.logits(h)


@pytest.fixture
def decoder():
    torch._dynamo.reset()
    decoder = Step3VL.from_preset("tiny", seed=0, device="cpu").decoder
    decoder.unpack()
    return decoder


@torch.inference_mode()
def filled(decoder: Decoder) -> KVCache:
    """A cache whose first three pages hold a prompt of 40 tokens."""
    cache = KVCache(decoder.config, PAGES, page_size=PAGE)
    ids = torch.arange(40) % decoder.config.vocab_size
    decoder.impl["linear"] = "eager"
    decoder(decoder.embed(ids), Step.of_sequence(0, 40, cache), cache)
    return cache


def nodes(own: int) -> list[PlanNode]:
    """Two rollouts with `own` tokens each after the prompt."""
    return [
        PlanNode([0, 1, 2], 40, 0, 2),
        PlanNode([3], own, 0, 1, num_new=1),
        PlanNode([4], own, 1, 2, num_new=1),
    ]


def step(own: int, plan: PrefixPlan) -> tuple[Tensor, Tensor, PlanTensors]:
    """Positions, slots and the plan, as `DecodeStep` takes them."""
    positions = torch.tensor([39 + own] * 2)
    return positions, torch.tensor([3, 4]) * PAGE + own - 1, plan.tensors


def clones(cache: KVCache) -> tuple[Tensor, Tensor]:
    return cache.k.clone(), cache.v.clone()


IDS = torch.tensor([5, 9])


@torch.no_grad()
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[pytest.mark.cli, pytest.mark.skipif(not which("g++"), reason="no g++")],
        ),
    ],
)
@torch._inductor.config.patch(compile_threads=1)  # no processes that compile in parallel
def test_compiled_step(decoder: Decoder, backend: str):
    """Guards logits and the cache over steps of one padded plan: its tensors are refilled between
    calls, and the compiled step follows without a new compilation."""
    cache, plan = (
        filled(decoder),
        PrefixPlan.build(
            nodes(1), num_rows=2, num_pages=PAGES, page_size=PAGE, capacity=Capacity(2, 2, 2)
        ),
    )
    run, graphs = DecodeStep(decoder), []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(run, fullgraph=True, backend=counting)
    ours, theirs = clones(cache), clones(cache)
    for own in (1, 2, 3):
        plan.refill(nodes(own))
        inputs = step(own, plan)
        got = compiled(IDS + own, *inputs[:2], *ours, inputs[2])
        expected = run(IDS + own, *inputs[:2], *theirs, inputs[2])
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1


@torch.no_grad()
def test_exported_step(decoder: Decoder):
    """Guards the exported program: it runs another step, with the tensors of another plan."""
    cache = filled(decoder)
    plans = [
        PrefixPlan.build(nodes(own), num_rows=2, num_pages=PAGES, page_size=PAGE) for own in (1, 2)
    ]
    run = DecodeStep(decoder)
    first, second = step(1, plans[0]), step(2, plans[1])
    program = torch.export.export(run, (IDS, *first[:2], *clones(cache), first[2]))
    names = [str(node.target) for node in program.graph.nodes]
    layers = decoder.config.layers
    assert sum(name.startswith("pacore.rotary_attention") for name in names) == layers
    ours, theirs = clones(cache), clones(cache)
    got = program.module()(IDS, *second[:2], *ours, second[2])
    expected = run(IDS, *second[:2], *theirs, second[2])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_packed_weights_are_refused(decoder: Decoder):
    """Guards against an error of the compiler's insides for weights that a CPU holds packed."""
    cache, plan = (
        filled(decoder),
        PrefixPlan.build(nodes(1), num_rows=2, num_pages=PAGES, page_size=PAGE),
    )
    decoder.impl["linear"] = "portable"
    decoder.pack()
    inputs = step(1, plan)
    compiled = torch.compile(DecodeStep(decoder), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="call `Decoder.unpack` first"):
        compiled(IDS, *inputs[:2], *clones(cache), inputs[2])
