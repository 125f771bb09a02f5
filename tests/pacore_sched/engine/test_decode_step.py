"""What a decode step launches on a GPU besides its layers' kernels: recorded, not run."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.compile.launches import launches_recorded
from kernels.prefix_attention.advance import advance_kernel
from kernels.prefix_plan import Capacity
from kernels.runtime.configs import H200
from model.config import PRESETS
from pacore_sched.engine.decode_graph import MIN_LEVELS, DecodeGraph
from pacore_sched.engine.decode_step import LastTokens, SamplingKey
from pacore_sched.engine.launch_sites import one_layer

PRODUCTS = {"mm", "addmm", "linear"}
LAST_OF_LAYERS = "rms_norm_kernel"


class PyTorchOps(TorchDispatchMode):
    """Appends the names of PyTorch's ops that launch something, products as "linear"."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        name = op.overloadpacket.__name__
        if not op.is_view and "empty" not in name and name != "_unsafe_view":
            self.names.append("linear" if name in PRODUCTS else name)
        return op(*args, **(kwargs or {}))


def launched(settings: SamplingKey, rows: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All launches of a graph of one layer, in order; Triton's end in "_kernel"."""
    names: list[str] = []

    class Recorded:
        """Takes a CUDA graph's place."""

        def __init__(self, body: Callable[[], Tensor], device: torch.device, pool: object) -> None:
            body()  # makes what is kept
            names.clear()
            with PyTorchOps(names):
                body()

    model = one_layer(PRESETS["tiny"], torch.bfloat16)
    cache, tables = model.new_cache(8), LastTokens(rows, model.device)
    with launches_recorded(H200), monkeypatch.context() as patch:
        # Of the class that kernels are of: pytest's process has Triton interpret.
        record = lambda kernel, *args, **options: names.append(kernel.fn.__name__)  # noqa: E731
        patch.setattr(type(advance_kernel), "run", record)
        capacity = Capacity(rows, rows, MIN_LEVELS)
        DecodeGraph(model, cache, tables, capacity, settings, Recorded, None)
    return names


@pytest.mark.parametrize(
    ("settings", "draws"),
    [((1.0, 0, 1.0), ()), ((0.0, 0, 1.0), ()), ((1.0, 20, 0.95), ("cut", "draw"))],
    ids=["plain", "greedy", "truncated"],
)
@pytest.mark.parametrize(("rows", "pieces"), [(4, ()), (64, ("pieces",))])
@torch.no_grad()  # in inference mode a cast would be recorded as a view
def test_no_small_launches(
    settings: SamplingKey,
    draws: tuple[str, ...],
    rows: int,
    pieces: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
):
    """Guards the step against the indices, casts, sums and copies that surrounded its ops, each a
    launch of its own in every step. Small tiles alone, by rule, have no pieces written down."""
    names = launched(settings, rows, monkeypatch)
    of_pytorch = [name for name in names if not name.endswith("_kernel")]
    assert of_pytorch == ["embedding"] + ["linear"] * 5  # qkv, o, gate_up, down; the LM head
    layers = len(names) - names[::-1].index(LAST_OF_LAYERS)
    plan = [f"{name}_kernel" for name in ("advance", "schedule", *pieces)]
    samples = [f"sample_{part}_kernel" for part in ("scan", *draws, "pick")]
    assert names[layers:] == [*plan, "linear", *samples]
