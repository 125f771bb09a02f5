"""A decode step's launches on a GPU apart from its layers' kernels: recorded, not run."""

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
    """Records the names of PyTorch ops that launch a kernel; matrix products as "linear"."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        name = op.overloadpacket.__name__
        if not op.is_view and "empty" not in name and name != "_unsafe_view":
            self.names.append("linear" if name in PRODUCTS else name)
        return op(*args, **(kwargs or {}))


def launched(sampling_key: SamplingKey, rows: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All launches of a one-layer graph, in order; names of Triton kernels end in "_kernel"."""
    names: list[str] = []

    class Recorded:
        """Stands in for a CUDA graph."""

        def __init__(self, body: Callable[[], Tensor], device: torch.device, pool: object) -> None:
            body()  # allocates what later runs reuse
            names.clear()
            with PyTorchOps(names):
                body()

    model = one_layer(PRESETS["tiny"], torch.bfloat16)
    cache, last_tokens = model.new_cache(8), LastTokens(rows, model.device)
    with launches_recorded(H200), monkeypatch.context() as patch:
        # Patched on the kernels' own class, as Triton interprets in pytest's process.
        record = lambda kernel, *args, **options: names.append(kernel.fn.__name__)  # noqa: E731
        patch.setattr(type(advance_kernel), "run", record)
        capacity = Capacity(rows, rows, MIN_LEVELS)
        DecodeGraph(model, cache, last_tokens, capacity, sampling_key, Recorded, None)
    return names


@pytest.mark.parametrize(
    ("sampling_key", "extra_kernels"),
    [
        (SamplingKey(1.0, 0, 1.0), ()),
        (SamplingKey(0.0, 0, 1.0), ()),
        (SamplingKey(1.0, 20, 0.95), ("cut", "draw")),
        (SamplingKey(0.6, 0, 1.0, "processed"), ()),
        (SamplingKey(1.0, 20, 0.95, "processed"), ("cut", "draw")),
    ],
    ids=["plain", "greedy", "truncated", "plain processed", "truncated processed"],
)
@pytest.mark.parametrize(("rows", "pieces"), [(4, ()), (64, ("pieces",))])
@torch.no_grad()  # in inference mode a cast would be recorded as a view
def test_no_small_launches(
    sampling_key: SamplingKey,
    extra_kernels: tuple[str, ...],
    rows: int,
    pieces: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
):
    """Guards against the index, cast, sum and copy kernels that once surrounded the ops, each an
    extra launch in every step. With small tiles only, the rule's schedule records no pieces."""
    names = launched(sampling_key, rows, monkeypatch)
    pytorch_ops = [name for name in names if not name.endswith("_kernel")]
    assert pytorch_ops == ["embedding"] + ["linear"] * 5  # qkv, o, gate_up, down; the LM head
    layers = len(names) - names[::-1].index(LAST_OF_LAYERS)
    plan = [f"{name}_kernel" for name in ("advance", "schedule", *pieces)]
    samples = [f"sample_{part}_kernel" for part in ("scan", *extra_kernels, "pick")]
    assert names[layers:] == [*plan, "linear", *samples]
