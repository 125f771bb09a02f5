"""The cost model: its work line against the schedule, its bytes against brute force."""

import json
from itertools import product

import numpy as np
import pytest
import torch

from bench import __main__ as command
from bench.cost import attention as cost
from bench.cost.attention import Shape, model_work_line, spec_of
from bench.inputs import forests
from bench.inputs.plans import prefix_plan
from bench.inputs.trees import Node, fork
from bench.measure.roofline import Roofline
from bench.suite.prefix_attention import inputs as prefix_attention_inputs
from kernels.prefix_attention import prefix_attention
from kernels.prefix_attention.schedule import Schedule, ScheduleSpec
from kernels.runtime.configs import H200, Gpu, assume_gpu
from model.errors import InputError

PAGE = 8
FORESTS = {
    # Several groups of different shapes; suffixes of 1, grain - 1, grain, grain + 1, a prime.
    "groups": [fork(40, [1, 3, 4, 5, 13]), fork(3, [9]), fork(17, [2] * 9)],
    # Nodes without tokens, nodes that no row reads, two and three levels.
    "empty nodes": [
        Node(11, children=(Node(0, children=(Node(1, new=1), Node(7, new=2))), Node(6))),
        Node(0, children=(Node(5, new=1),)),
    ],
    "nothing visible": [Node(9)],
    "prefill after a prefix": [Node(70, new=37), fork(5, [2])],
    "many small nodes": [fork(6, [3] * 60)],
}
BOTH, LARGE, SMALL = (16, 4), (8, 0), (0, 4)
SPECS = [
    ScheduleSpec(kv_heads, 2, sizes, 4, overhead, programs, window, invariant)
    for kv_heads, sizes, (overhead, invariant), programs, window in product(
        (1, 3), (BOTH, LARGE, SMALL), ((2, False), (0, False), (0, True)), (5, 64), (0, 6)
    )
]


def places_of(line, spec):
    """The places of the line, one by one: (size, head, tile, place within the tile)."""
    tiles = np.arange(len(line.starts) - 1)
    for size, of_size in enumerate((tiles[: line.counts[0]], tiles[line.counts[0] :])):
        for head in range(spec.kv_heads):
            for tile in of_size:
                for place in range(line.starts[tile + 1] - line.starts[tile]):
                    yield size, head, int(tile), place


class TestModel:
    @pytest.mark.parametrize("forest", FORESTS.values(), ids=FORESTS)
    def test_equals_the_schedule(self, forest, triton_device):
        """Guards the table against modelling another schedule than that of the kernels."""
        plan = prefix_plan(0, triton_device, forest=forest, page_size=PAGE)
        for spec in SPECS[::5]:  # has every value of every axis
            line, schedule = model_work_line(plan, spec), Schedule(plan, spec)
            assert list(line.counts) == schedule.counts, spec
            assert line.starts.tolist() == schedule.starts.tolist(), spec
            assert schedule.range_length.tolist() == [line.range_length] * 2, spec
            first_tile = schedule.first_tile.cpu().numpy()
            assert (first_tile == line.first_tile)[line.first_tile >= 0].all(), spec
            size = (line.tile >= line.counts[0]).astype(int)
            assert len(set(zip(size, line.partial, strict=True))) == len(line.tile), spec
            assert (line.partial >= 0).all(), spec
            assert (line.partial < np.array(schedule.partials)[size]).all(), spec

    @pytest.mark.parametrize("forest", FORESTS.values(), ids=FORESTS)
    def test_items_are_the_places_of_the_line(self, forest):
        """Guards items and balance: every place belongs to one program, in the line's order."""
        plan = prefix_plan(0, "cpu", forest=forest, page_size=PAGE)
        for spec in SPECS:
            line = model_work_line(plan, spec)
            items, work, firsts = set(), np.zeros(spec.programs, dtype=int), {}
            for offset, (size, head, tile, place) in enumerate(places_of(line, spec)):
                program = offset // line.range_length
                work[program] += 1
                firsts.setdefault((size, program), tile - size * line.counts[0])
                if place >= spec.overhead:
                    partial = head * line.counts[size] + tile - size * line.counts[0] + program
                    if spec.invariant:
                        partial = offset - size * spec.kv_heads * line.starts[line.counts[0]]
                    items.add((tile, program, partial))
            assert items == set(zip(line.tile, line.program, line.partial, strict=True)), spec
            assert len(items) == len(line.tile), spec
            assert (work == line.work).all(), spec
            expected = [
                [firsts.get((size, program), -1) for program in range(spec.programs)]
                for size in (0, 1)
            ]
            assert line.first_tile.tolist() == expected, spec

    @pytest.mark.parametrize("window", [0, 1, 6, 1000])
    @pytest.mark.parametrize("forest", FORESTS.values(), ids=FORESTS)
    def test_tokens(self, forest, window):
        """Guards bytes and operations against what each row sees, token by token."""
        plan = prefix_plan(0, "cpu", forest=forest, page_size=PAGE)
        seen = {row: [] for row in range(plan.num_rows)}  # (node, token), oldest first
        for index, node in enumerate(plan.nodes):
            for row in range(node.row_start, node.row_end):
                visible = min(node.kv_len, node.kv_len - node.num_new + row - node.row_start + 1)
                seen[row] += [(index, token) for token in range(visible)]
        seen = {row: tokens[-window:] if window else tokens for row, tokens in seen.items()}
        path = {row: [n.row_start <= row < n.row_end for n in plan.nodes] for row in seen}
        runs = {}
        for row in seen:
            runs.setdefault(tuple(path[row]), set()).update(seen[row])
        shared, unshared, pairs = cost.tokens(plan, window)
        assert shared == len(set().union(*seen.values()))
        assert unshared == sum(map(len, runs.values()))
        assert pairs == sum(map(len, seen.values()))
        # With grains of one token and one tile per node, the programs load exactly that.
        line = model_work_line(plan, ScheduleSpec(1, 1, (1024, 0), 1, 0, 3, window))
        assert line.tokens.sum() == shared

    def test_partials_left_for_the_merge(self):
        """Guards the bytes of partials: one program finishes rows that are alone in their node."""
        plan = prefix_plan(0, "cpu", forest=[Node(16, new=4), fork(8, [1, 1])], page_size=PAGE)
        line = model_work_line(plan, ScheduleSpec(1, 2, (64, 0), 4, 0, 1))
        assert line.vectors.tolist() == [0, 4, 2, 2]
        split = model_work_line(plan, ScheduleSpec(1, 2, (64, 0), 4, 0, 2))
        assert split.vectors.tolist() == [0, 4, 2, 2]
        split = model_work_line(plan, ScheduleSpec(1, 2, (64, 0), 4, 0, 4))
        assert split.vectors.tolist() == [8, 8, 4, 2, 2]

    @pytest.mark.parametrize("shape", [{}, {"window": 5}, {"invariant": True}, {"fp8": True}])
    def test_spec_is_the_launchers(self, shape, triton_device):
        """Guards the table against other tile sizes, grains or programs than those launched."""
        dtype = torch.float16
        arguments = prefix_attention_inputs(
            0,
            triton_device,
            dtype,
            forest=[fork(20, [1, 18])],
            heads=4,
            kv_heads=2,
            head_dim=16,
            page_size=16,
            window=shape.get("window", 0),
            fp8=shape.get("fp8", False),
        )
        gpu = Gpu("two SMs", arch=90, sms=2, shared_bytes=H200.shared_bytes)
        invariant = shape.get("invariant", False)
        with assume_gpu(gpu):
            prefix_attention(**arguments, impl="triton", batch_invariant=invariant)
        expected = spec_of(arguments["plan"], Shape(4, 2, 16, 16, dtype, **shape), gpu)
        assert list(arguments["plan"].schedules) == [expected]


class TestTable:
    def test_floor_of_a_decode_step(self):
        """Guards the units: 4,096 bytes of KV per token and layer, once or for every rollout."""
        best = Roofline("", "bfloat16", 4300.0, 800.0)
        row = cost.cost(*forests.rollouts(32, 4096, 512), Shape(), H200, best)
        assert row["kv_bytes"] == 4096 * (4096 + 32 * 512)
        assert row["kv_unshared_bytes"] == 4096 * 32 * (4096 + 512)
        assert row["floor_us"] == pytest.approx(19.5, rel=0.01)
        assert row["floor_unshared_us"] == pytest.approx(140, rel=0.01)
        fp8 = cost.cost(*forests.rollouts(32, 4096, 512), Shape(fp8=True), H200, best)
        assert fp8["kv_bytes"] == row["kv_bytes"] * (128 + 4) / 256

    def test_workspace(self):
        """Guards the workspace at 256k: it depends on the rows and the CTAs, not on the context; in
        the batch-invariant mode on both."""
        best = Roofline("", "bfloat16", 4300.0, 800.0)
        trees = [tree for tree in forests.long_contexts() if "prefill" in tree[0]]
        vectors = (8 * (2048 * 4 // 128) + 132) * 128  # of the KV heads' tiles, and one per CTA
        for tree in trees:
            row = cost.cost(*tree, Shape(), H200, best)
            assert row["workspace_bytes"] == vectors * 129 * 4
            assert row["kv_bytes"] == 4096 * sum(node.tokens for node in tree[1])
        one, two = (cost.cost(*tree, Shape(invariant=True), H200, best) for tree in trees)
        assert two["workspace_bytes"] == 2 * one["workspace_bytes"]
        assert one["workspace_bytes"] == 2048 * 32 * (131072 // 256) * 129 * 4

    @pytest.mark.parametrize("gpu", cost.GPUS)
    def test_balance(self, gpu):
        """Guards the requirement that no SM has more than 1.1 times the mean work, over the whole
        grid and all trees, if there are at least as many items as an H200 has SMs."""
        # 1,552 places for 216 programs: a work range has whole places, 8 where 7.2 would be even,
        # so that the last 22 programs have nothing to do. Balance 1.113.
        known = {"h200": set(), "a100": {"B16 P512 S128"}}[gpu]
        rows = [row for row in cost.table(gpu) if row["table"] == "fastest"]
        assert len(rows) >= 90 + 9 + 6
        large_rows = [row for row in rows if row["items"] >= 132]
        assert {row["case"] for row in large_rows if row["balance_places"] > 1.1} == known
        assert len(large_rows) == len(rows)

    def test_rotary(self):
        """Guards the default: the fused form adds less in every case whose rows are all a decode
        step's.

        B16 P2048 S128 has 8 x (64 vectors of the prefix + 16 x 4 of the suffixes), once in each op;
        fused, they are rotated once per item.
        """
        rows = [row for row in cost.table("h200") if row["table"] == "rotary"]
        assert "prefill 2048" not in {row["case"] for row in rows} and len(rows) > 10
        assert all(row["fused_us"] < row["separate_us"] for row in rows)
        row = next(row for row in rows if row["case"] == "B16 P2048 S128")
        assert row["separate_vectors"] == 16 * 32
        plan = prefix_plan(0, "cpu", forest=forests.rollouts(16, 2048, 128)[1])
        line = model_work_line(plan, spec_of(plan, Shape(fused=True), H200))
        sizes = [64, 4]  # vectors of an item of either kind of tile
        items = [sizes[int(tile >= line.counts[0])] for tile in line.tile]
        assert row["fused_vectors"] == sum(items)

    def test_command(self, capsys):
        """Guards the printed tables, and the label of a data sheet's figure."""
        arguments = ["cost", "--shape", "P2048 S128", "--gpu", "a100", "--device", "cpu"]
        assert command.main([*arguments, "--copy-gb-s", "1700"]) == 0
        printed = capsys.readouterr().out
        assert "fastest (nvidia-a100)" in printed
        assert "copy 1,700 GB/s (given), matrix product 312 TFLOP/s (data sheet)" in printed
        assert command.main([*arguments, "--json"]) == 0
        rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
        assert {row["case"] for row in rows} == {f"B{b} P2048 S128" for b in (16, 32, 64)}
        modes = {row["mode"] for row in rows if row["op"] == "prefix_attention"}
        assert modes == {"fast", "batch-invariant", "fp8"}
        assert {row["copy_source"] for row in rows} == {"datasheet"}
        with pytest.raises(InputError, match="cost models only prefix_attention"):
            command.main(["cost", "--op", "rms_norm", "--device", "cpu"])
        with pytest.raises(InputError, match="'B7'"):
            command.main(["cost", "--shape", "B7", "--device", "cpu"])
