"""FastTree (MLSys'25): attention over the nodes of a prefix tree, with two query tile sizes.

Its code is not a package: FASTTREE_HOME names the folder of its artifact with `fasttree.py`
(docs/peers.md). It plans outside the timed call, as in its own benchmark and with that
benchmark's constants; K and V are stored node after node, as it requires.
"""

import io
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from bench.peers.flex_peer import packed
from bench.peers.peer import Library, Unavailable, on_gpu
from kernels.prefix_plan import PrefixPlan

# From the artifact's benchmark: KV tokens per program, and programs that fill a GPU of 132 SMs.
KV_TILES, KV_SPLITS = [32, 32], [1024, 128]
FEW_PROGRAMS = ([132, 528], [132, 132])


@dataclass
class TreeNode:
    """A node in FastTree's format; its id is its index in a list, 0 for the root."""

    parent: int
    id: int
    seqlen: int
    num_children: int = 0
    requests: list[int] = field(default_factory=list)  # rows that see it


def tree(inputs: dict) -> Callable[[], Tensor]:
    """One launch per tile size for all nodes, and one for the merge."""
    q, plan = inputs["q"], inputs["plan"]
    fasttree = check(q.device)
    if inputs["window"] or not plan.is_decode:
        raise Unavailable("supports only decode without a window")
    k, v = (x.contiguous() for x in packed(inputs))  # [tokens, Hkv, D]
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[2]
    group = heads // kv_heads
    params = fasttree.FastTreeParams()
    params.set_q_tile_sizes([max(64 // group, 1), max(16 // group, 1)])
    params.set_kv_tile_sizes(KV_TILES)
    params.set_kv_group_num(group)
    nodes = tree_nodes(plan)
    starts = torch.tensor([0] + [node.seqlen for node in nodes]).cumsum(0).tolist()
    shape = (len(q), heads, kv_heads, dim)
    with redirect_stdout(io.StringIO()):  # it prints its choices
        assignments, _ = fasttree.fasttree_preparation(
            nodes, starts, *shape, KV_SPLITS, *FEW_PROGRAMS, params
        )
    out, tiles = torch.empty_like(q), (params.TSQs, params.TSKs)

    def call() -> Tensor:
        fasttree.fasttree_decode(q, k, v, out, *assignments, *tiles, inputs["scale"])
        return out

    return call


def tree_nodes(plan: PrefixPlan) -> list[TreeNode]:
    """The plan's nodes in order, below an additional empty root if there are several roots."""
    nodes: list[TreeNode] = []
    add_root = plan.depths.count(0) > 1
    if add_root:
        nodes.append(TreeNode(-1, 0, 0, requests=list(range(plan.num_rows))))
    path: list[int] = [0] if add_root else []  # to the previous node
    for node, depth in zip(plan.nodes, plan.depths, strict=True):
        del path[depth + add_root :]
        parent = path[-1] if path else -1
        if path:
            nodes[parent].num_children += 1
        path.append(len(nodes))
        rows = list(range(node.row_start, node.row_end))
        nodes.append(TreeNode(parent, len(nodes), node.kv_len, requests=rows))
    return nodes


def check(device: torch.device) -> ModuleType:
    """The artifact's module; raises Unavailable without it or without a GPU."""
    on_gpu(device)
    home = os.environ.get("FASTTREE_HOME")
    if not home:
        raise Unavailable("not installed (set FASTTREE_HOME to the folder with fasttree.py)")
    return _loaded(Path(home) / "fasttree.py")


@cache
def _loaded(path: Path) -> ModuleType:
    if not path.exists():
        raise Unavailable(f"not installed ({path} does not exist)")
    spec = spec_from_file_location("fasttree", path)
    assert spec is not None and spec.loader is not None  # as for every path that ends in .py
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FASTTREE = Library(
    "FastTree",
    "set FASTTREE_HOME to its artifact's folder (docs/peers.md)",
    lambda: os.environ.get("FASTTREE_HOME"),
    check,
)
