"""Ops inside torch.compile and torch.export: one node each, with the results of a direct call."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels.torch_ops  # noqa: F401 - registers
from tests.kernels.torch_ops.operator_calls import calls, copied, direct

CALLS = calls()


@pytest.fixture(autouse=True)
def recompiled():
    """Without the compiled functions of earlier tests, which count against dynamo's limit."""
    torch._dynamo.reset()


def nodes_of(graph: torch.fx.Graph) -> list[str]:
    """The names of our operators in a graph, in order."""
    targets = (str(node.target) for node in graph.nodes)
    return [name.split(".")[1] for name in targets if name.startswith("pacore.")]


@pytest.mark.parametrize("name", CALLS)
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
