"""`python -m bench dispatch`: what a call through PyTorch's dispatcher costs the host.

    direct      the op's function, as the engine calls it
    operator    torch.ops.pacore.<op>, as compiled code and other people's models call it
    custom_op   the same call, registered with `torch.library.custom_op` instead

The ops of a decode step, with so little work that the host's share dominates; the difference from
"direct" is the dispatcher's. On a GPU the host does not wait for the kernels.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

import kernels.torch_ops  # noqa: F401 - registers
from bench.measure.devices import MAIN_DTYPE
from bench.measure.origin import origin
from bench.rows.schema import Measured
from kernels.activation import silu_mul
from kernels.kv_pages import KVPages
from kernels.norm import rms_norm
from kernels.plan_node import PlanNode
from kernels.prefix_plan import PrefixPlan
from kernels.rotary_attention import rotary_attention
from kernels.rotary_tables import rotary_frequencies
from kernels.runtime.dtypes import dtype_name
from kernels.sampling import SampleOutput, sample
from model.terminal import track

CALLS = 50  # per repeat
REPEATS = 40
Forms = dict[str, Callable[[], object]]


def run(device: torch.device) -> Iterator[dict]:
    """A row per op and form."""
    dtype = MAIN_DTYPE[device.type]
    for name, forms in track(list(_cases(device, dtype).items()), "dispatch"):
        times = _host_times(forms, device)
        for form, (p20, median, p80) in times.items():
            row = Measured(
                op="dispatch",
                case=name,
                impl=form,
                dtype=dtype_name(dtype),
                p20_us=p20,
                median_us=median,
                p80_us=p80,
                repeats=REPEATS,
                timer="clock",
            ).row(origin(device))
            yield row | {"over_direct_us": median - times["direct"][1]}


def _cases(device: torch.device, dtype: torch.dtype) -> dict[str, Forms]:
    """Each op's forms on one row, two heads of 16, and a vocabulary of 64."""
    ops = torch.ops.pacore
    random = partial(torch.randn, device=device, dtype=dtype)
    x, residual, weight, gate_up = random(1, 32), random(1, 32), random(32), random(1, 64)
    plan = PrefixPlan.build(
        [PlanNode([0], 3, 0, 1, num_new=1)], num_rows=1, num_pages=1, page_size=16, device=device
    )
    pages, scale = KVPages(random(1, 1, 16, 16), random(1, 1, 16, 16)), 0.25
    at = torch.tensor([2], device=device)
    frequencies = rotary_frequencies([1.0] * 8).to(device)
    rotary = (random(1, 64), random(16), random(16), frequencies, at, at)
    logits, out = random(1, 64), SampleOutput.of(1, device)
    feeds = (out.results, None, None, None)
    return {
        "rms_norm": {
            "direct": lambda: rms_norm(x, weight, eps=1e-6),
            "operator": lambda: ops.rms_norm(x, weight, 1e-6),
            "custom_op": partial(_custom_rms_norm(), x, weight, 1e-6),
        },
        "rms_norm with a residual": {
            "direct": lambda: rms_norm(x, weight, eps=1e-6, residual=residual),
            "operator": lambda: ops.add_rms_norm(x, residual, weight, 1e-6),
        },
        "silu_mul": {
            "direct": lambda: silu_mul(gate_up),
            "operator": lambda: ops.silu_mul(gate_up),
        },
        "rotary_attention": {
            "direct": lambda: rotary_attention(*rotary, pages, plan, scale=scale),
            "operator": lambda: ops.rotary_attention(*rotary, *pages, plan.tensors, scale),
        },
        "sample": {
            "direct": lambda: sample(logits, at, at, temperature=1.0, out=out),
            "operator": lambda: ops.sample(*feeds, logits, at, at, 1.0),
        },
    }


def _custom_rms_norm() -> Callable[..., Tensor]:
    def call(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps=eps)

    return torch.library.custom_op("pacore_bench::rms_norm", call, mutates_args=())


@torch.inference_mode()
def _host_times(forms: Forms, device: torch.device) -> dict[str, tuple[float, float, float]]:
    """p20, median and p80 of the host's microseconds per call, the forms in alternating order."""
    samples: dict[str, list[float]] = {form: [] for form in forms}
    order = list(forms.items())
    for repeat in range(-2, REPEATS):  # two to warm up
        for form, call in order:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # an empty queue, which never fills up
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            if repeat >= 0:
                samples[form].append((time.perf_counter() - start) / CALLS * 1e6)
        order.reverse()
    return {form: tuple(np.percentile(x, [20, 50, 80]).tolist()) for form, x in samples.items()}
