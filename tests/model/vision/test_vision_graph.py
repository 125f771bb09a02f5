"""Tests of the tower's CUDA graphs: which calls are captured, and that replays compute the same."""

from unittest.mock import MagicMock, Mock, patch

import pytest
import torch
from torch import Tensor

from kernels.runtime.tensor_cache import pinning
from model.step3vl import Step3VL
from model.vision.graph import Graphs


class Recorded:
    """A fake CUDA graph for any device: its output is one reused buffer."""

    captures, replays = 0, 0

    def __init__(self, body, inputs: Tensor, pool: object) -> None:
        self.body, self.output = body, body(inputs)
        Recorded.captures += 1

    def __call__(self, inputs: Tensor) -> Tensor:
        Recorded.replays += 1
        return self.output.copy_(self.body(inputs))


@pytest.fixture
def vision():
    """The tower of `tiny` with recorded graphs."""
    vision = Step3VL.from_preset("tiny", seed=1).vision
    vision.graphs.enabled, vision.graphs.capture = True, Recorded
    Recorded.captures = Recorded.replays = 0
    return vision


def counts() -> tuple[int, int]:
    return Recorded.captures, Recorded.replays


def views_of(seed: int, *sides: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, side, side, generator=generator) for side in sides]


@pytest.mark.parametrize("sides", [(28, 28), (28, 42, 28)])
def test_captured_the_second_time(vision, sides: tuple[int, ...]):
    """Guards replays with new pixels, in any order of views, and results against later replays."""
    plain = Step3VL.from_preset("tiny", seed=1).vision
    views = [views_of(seed, *sides) for seed in range(4)]
    results = [vision(batch) for batch in views]
    assert counts() == (1, 3)
    for batch, result in zip(views, results, strict=True):
        assert torch.equal(result, plain(batch))
    reordered = views[3][::-1]
    assert torch.equal(vision(reordered), plain(reordered))
    assert counts() == (1, 4)
    vision(views_of(0, *sides, *sides))
    assert counts() == (1, 4)


def test_new_weights_and_impls_are_captured_again(vision):
    """Guards against replaying a graph with the kernels and addresses of an old impl or weight."""
    views = views_of(0, 28)
    vision(views), vision(views)
    vision.impl["layer_norm"] = "eager"
    vision(views)
    assert counts() == (1, 1)
    vision(views)
    assert counts() == (2, 2)
    vision.blocks[0].fc.mul_(2)
    vision.prepare()
    vision(views)
    assert counts() == (2, 2)
    vision(views)
    assert counts() == (3, 3)


def test_captured_by_impl_not_by_device():
    """Guards eager towers on a GPU: their copies from the host cannot be captured, and a failed
    capture breaks the process."""
    inputs = MagicMock(is_cuda=True)
    inputs.__len__.return_value = 8
    with patch("torch.cuda.is_current_stream_capturing", return_value=False):
        for impls, captured in (((None, "triton"), True), ((None, "eager"), False)):
            graphs = Graphs()
            graphs._pool, graphs.capture = object(), Mock()
            for _ in range(2):
                graphs.find("key", Mock(), inputs, impls)
            assert graphs.capture.called == captured


def test_a_few_small_batches(vision):
    """Guards against memory that grows with every image size, and graphs of large batches, which
    gain nothing."""
    vision.graphs = Graphs(max_graphs=2, max_rows=9)
    vision.graphs.enabled, vision.graphs.capture = True, Recorded
    for side in (14, 28, 42, 56):
        vision(views_of(0, side)), vision(views_of(1, side))
    assert counts() == (3, 3)  # the last has 16 rows
    assert len(vision.graphs._graphs) == 2
    vision(views_of(0, 28)), vision(views_of(0, 42))
    assert counts() == (3, 5)
    vision(views_of(0, 14))
    assert counts() == (4, 6)


def test_a_failed_capture_runs_without_a_graph(vision):
    """Guards against a wrong result, a second try or a second warning after a failed capture."""
    tries = []

    def fail(body, inputs: Tensor, pool: object) -> None:
        tries.append(pool)
        raise RuntimeError("operation not permitted when stream is capturing")

    vision.graphs.capture = fail
    views = views_of(0, 28)
    first = vision(views)
    with pytest.warns(UserWarning, match="without a CUDA graph: operation not permitted") as caught:
        second = vision(views)
    assert torch.equal(vision(views), first) and torch.equal(second, first)
    assert len(caught) == len(tries) == 1


def test_off_without_a_gpu_or_when_disabled(vision):
    """Guards against graphs on a CPU, and when they are disabled."""
    for enabled in (None, False):
        vision.graphs.enabled = enabled
        for _ in range(3):
            vision(views_of(0, 28))
    assert counts() == (0, 0)


def test_tables_are_held(vision):
    """Guards interpolated positions that a graph reads and the tower drops from its cache."""
    with pinning() as pinned:
        vision(views_of(0, 28))
    assert any(table is vision._positions((2, 2)) for table in pinned.values())


@torch.inference_mode()
def test_no_table_is_computed_in_a_capture(vision, monkeypatch: pytest.MonkeyPatch):
    """Guards against a table computed during a capture: it would be in the graph's memory, which
    other replays overwrite. A body that ran once computes none, for any number of grids."""
    grids = tuple((rows, columns) for rows in range(1, 6) for columns in range(1, 6))
    patches = vision.patches([torch.randn(3, 14 * r, 14 * c) for r, c in grids])
    with pinning():
        first = vision.encode(patches, grids)
        monkeypatch.setattr(torch.nn.functional, "interpolate", None)
        monkeypatch.setattr(torch, "arange", None)
        assert torch.equal(vision.encode(patches, grids), first)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_replays_on_a_gpu(dtype: torch.dtype):
    """Guards against bits that differ from calls without a graph, also after other grids have
    filled every cache."""
    plain, replayed = (
        Step3VL.from_preset("tiny", seed=1, device="cuda", dtype=dtype).vision for _ in range(2)
    )
    plain.graphs.enabled = False
    views = [views_of(seed, 112, 168, 112) for seed in range(5)]
    expected = [plain(batch) for batch in views]
    results = [replayed(batch) for batch in views[:4]]
    (graph,) = (item for item, _ in replayed.graphs._graphs._items.values())
    assert graph, "not captured"
    for rows in range(1, 9):
        for columns in range(1, 9):
            replayed([torch.zeros(3, 14 * rows, 14 * columns)])
    torch.full((2**28,), torch.nan, device="cuda")  # overwrites freed memory
    results.append(replayed(views[4]))
    for result, want in zip(results, expected, strict=True):
        assert torch.equal(result, want)


@pytest.mark.gpu
def test_a_caller_may_capture():
    """Guards against a replay inside a caller's capture, which fails."""
    vision = Step3VL.from_preset("tiny", seed=1, device="cuda", dtype=torch.bfloat16).vision
    views = [view.cuda() for view in views_of(0, 112, 168)]
    expected = vision(views)
    assert torch.equal(vision(views), expected)  # captures the tower's graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = vision(views)
    graph.replay()
    assert torch.equal(out, expected)
