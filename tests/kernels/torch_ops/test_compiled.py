"""Ops inside torch.compile and torch.export: one node each, with the results of a direct call."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import kernels.torch_ops  # noqa: F401 - registers
from kernels.norm import rms_norm
from kernels.prefix_plan import Capacity, PrefixPlan
from model.cuda_graph import CudaGraph
from tests.kernels.torch_ops.operator_calls import (
    TRITON_ONLY,
    calls,
    copied,
    direct,
    operator,
    tree,
)

CALLS = calls()


@pytest.fixture(autouse=True)
def recompiled():
    """Without the compiled functions of earlier tests, which count against dynamo's limit."""
    torch._dynamo.reset()


def nodes_of(graph: torch.fx.Graph) -> list[str]:
    """The names of our operators in a graph, in order."""
    targets = (str(node.target) for node in graph.nodes)
    return [name.split(".")[1] for name in targets if name.startswith("pacore.")]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.interpreter] * (name in TRITON_ONLY)) for name in CALLS],
)
def test_compile_sees_one_operator(name: str):
    """Guards `fullgraph=True`: dynamo traces no launcher, and functionalisation keeps what is
    written in place."""
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        seen.extend(nodes_of(graph.graph))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(lambda *a: direct(name, a), fullgraph=True, backend=backend)
    ours, theirs = copied(CALLS[name]), copied(CALLS[name])
    with torch.no_grad():
        got, expected = compiled(*ours), direct(name, theirs)
    assert seen == [name]
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.gpu
@torch.inference_mode()
def test_in_a_cuda_graph():
    """Guards capture: no operator waits for the GPU, and a replay sees the plan's new values."""
    calls_on_gpu = calls("cuda", torch.bfloat16)
    step = tree("cuda", torch.bfloat16)
    q = calls_on_gpu["prefix_attention"][0]
    run = partial(torch.ops.pacore.prefix_attention, q, *step.pages)
    plan = PrefixPlan.build(
        step.plan.nodes,
        num_rows=3,
        num_pages=step.plan.num_pages,
        page_size=step.plan.page_size,
        device="cuda",
        capacity=Capacity(rows=3, max_node_rows=3, levels=2),
    )
    graph = CudaGraph(lambda: run(plan.tensors, 0.25)[0], torch.device("cuda"))
    plan.refill(replace(node, kv_len=max(1, node.kv_len - 1)) for node in step.plan.nodes)
    near = {"rtol": 2e-2, "atol": 2e-2}
    expected = run(plan.tensors, 0.25, impl="eager")[0]
    torch.testing.assert_close(graph.replay(), expected, **near)
    for name in CALLS.keys() - {"prefix_attention"}:
        ours, theirs = copied(calls_on_gpu[name]), copied(calls_on_gpu[name])
        captured = CudaGraph(partial(operator(name), *ours), torch.device("cuda"))
        got, expected = captured.replay(), operator(name)(*theirs)
        torch.testing.assert_close(got, expected, **near)
        torch.testing.assert_close(ours, theirs, **near)  # in place


class Norm(nn.Module):
    def forward(self, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(x, weight, eps=1e-6, residual=residual)


@torch.no_grad()
def test_export_of_one_op():
    """Guards torch.export: an operator instead of launches, for any number of rows, also when it
    is compiled for changing numbers."""
    x, residual, weight = torch.randn(4, 32), torch.randn(4, 32), torch.randn(32)
    rows = torch.export.Dim("rows", min=2)
    shapes = {"x": {0: rows}, "residual": {0: rows}, "weight": None}
    program = torch.export.export(Norm(), (x, residual, weight), dynamic_shapes=shapes)
    assert nodes_of(program.graph) == ["add_rms_norm"]
    compiled = torch.compile(Norm(), fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (4, 7, 130):
        inputs = torch.randn(count, 32), torch.randn(count, 32), weight
        for run in (program.module(), compiled):
            torch.testing.assert_close(run(*inputs), Norm()(*inputs), rtol=0, atol=0)
