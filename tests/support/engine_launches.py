"""Script that prints, as JSON, the kernels that an engine launches and `engine_sites` leaves out.

pacore_sched/engine/test_warm_up.py runs it in a separate process, because pytest's process
interprets Triton.
"""

import json
from collections.abc import Callable, Sequence
from itertools import cycle

import torch
from torch import Tensor

from kernels.compile.cache import compilations
from kernels.compile.launches import launches_recorded
from kernels.compile.worker import launches_of
from kernels.runtime.configs import H200
from kernels.sampling import LOGPROBS, sample
from model.config import PRESETS
from model.step3vl import Step3VL
from pacore_sched.answers.pacore import engine_for
from pacore_sched.engine import decode_step
from pacore_sched.engine.launch_sites import engine_sites
from pacore_sched.sched.request import Sampling

PROMPTS, ROLLOUTS, KV = (3, 40, 130), 5, (None, torch.float8_e4m3fn)
SETTINGS = (
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 5},
    {"top_p": 0.9},
    {"top_k": 5, "top_p": 0.9},
)
SAMPLINGS = tuple(
    Sampling(6, **settings, logprobs=logprobs, ignore_eos=True)
    for settings in (*SETTINGS, {"temperature": 0.7})
    for logprobs in LOGPROBS
)


class Graph:
    """A fake CUDA graph, whose body runs at each replay."""

    def __init__(self, body: Callable[[], Tensor], device: torch.device, pool: object) -> None:
        self.replay = body
        body()


def drawn(*args: object, **options: object) -> tuple[Tensor, ...]:
    """`sample` with tokens 0, since no kernel runs and its output is never written."""
    return tuple(result.zero_() for result in sample(*args, **options))


def run_engine(model: Step3VL, kv_dtype: torch.dtype | None, samplings: Sequence[Sampling]) -> None:
    """Submit prompts of several lengths one by one, so that steps mix prefill and decoding; each
    has one of `samplings`."""
    engine = engine_for(model, kv_dtype=kv_dtype, kv_tokens=4096, max_running=16)
    graphs = engine.executor.graphs
    graphs.enabled, graphs.capture = True, Graph
    for length, sampling in zip(PROMPTS, cycle(samplings), strict=False):
        segment = engine.executor.segment([1] * length)
        engine.submit([segment], 1, dict(enumerate(range(ROLLOUTS))), sampling)
        engine.step()
    while engine.busy:
        engine.step()
    assert len(graphs)


def missing() -> dict[str, int]:
    """Kernel name -> number of its launches that are not among those of the sites."""
    decode_step.sample = drawn
    config, counts = PRESETS["tiny"], {}
    for kv_dtype in KV:
        model = Step3VL.from_preset("tiny", dtype=torch.bfloat16)
        with launches_recorded(H200) as launches:
            for sampling in SAMPLINGS:
                run_engine(model, kv_dtype, [sampling])
            for start in range(0, len(SAMPLINGS), len(PROMPTS)):  # in parts
                run_engine(model, kv_dtype, SAMPLINGS[start:])
        sites = engine_sites(config, torch.bfloat16, kv_dtype)
        known = {key for s in sites for key in compilations(launches_of(s, H200), H200)}
        for launch in launches:
            if set(compilations([launch], H200)) - known:
                name = launch.kernel.fn.__name__
                counts[name] = counts.get(name, 0) + 1
    return counts


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(missing()))
