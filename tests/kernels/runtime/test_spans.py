"""Spans: no cost while off, and a complete breakdown of a step while on."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from kernels.kv_pages import KVPages
from kernels.runtime import spans
from kernels.runtime.dispatch import pick
from kernels.runtime.spans import begin, family, span, spanned, use
from model.config import PRESETS
from model.step3vl import Step3VL
from model.vision.pixels import View
from pacore_sched.answers.pacore import Pacore, engine_for
from pacore_sched.sched.request import Sampling
from tests.support import ROOT

# The operators that take a step's time; views and allocations are neither ops nor products.
WORK = ("mm", "addmm", "bmm", "_softmax", "embedding", "conv2d", "rsqrt", "silu", "exp_", "argmax")


def recorded(call) -> list:
    """The profiler's events of a call with spans on."""
    with use("torch"), profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return list(profiler.events())


def named(events: list) -> list[str]:
    return [event.name for event in events if event.is_user_annotation]


def outside(events: list) -> set[str]:
    """Operators of WORK that are in no span below a layer or a step."""
    names = set()
    for event in events:
        above, name = event.cpu_parent, event.name.removeprefix("aten::")
        while above is not None and not above.is_user_annotation:
            above = above.cpu_parent
        has_span = above is not None and " layer" not in above.name and above.name != "execute"
        if name in WORK and not has_span:
            names.add(event.name)
    return names


def test_off_is_the_bare_function():
    """Guards every call of every op: without a profiler there is not even a wrapper."""
    assert spanned("op", torch.add) is torch.add
    assert span("op") is span("other", 3)
    with torch.no_grad():  # else inputs are checked for gradients
        assert pick("op", None, torch.device("cpu"), {"eager": torch.add}) is torch.add
    begin("round", 0)()


def test_use_ends_with_its_block():
    """Guards a process that profiled once: an error inside the block must not leave spans on."""
    with pytest.raises(KeyError), use("torch"):
        assert spanned("op", torch.add) is not torch.add
        with use("off"):
            assert spanned("op", torch.add) is torch.add
        assert spanned("op", torch.add) is not torch.add
        raise KeyError
    assert spanned("op", torch.add) is torch.add
    with pytest.raises(ValueError, match="must be one of off, nvtx, torch"), use("cupti"):
        pass


def test_decoder_is_all_in_spans():
    """Guards the breakdown: an op or product without a span would be missing from it."""
    model = Step3VL.from_preset("tiny", seed=0)
    events = recorded(lambda: model.generate(list(range(1, 20)), max_tokens=2, seed=7))
    assert outside(events) == set()
    layers = PRESETS["tiny"].decoder.layers
    products = {f"linear {name}" for name in ("qkv", "o", "gate_up", "down", "lm_head")}
    names = named(events)
    assert {family(name) for name in names} >= {"decoder layer", "embed", "sample", *products}
    for name in ("linear qkv", "prefix_attention", "silu_mul"):
        assert names.count(name) == 2 * layers, "once in each layer of both steps"


def test_tower_is_all_in_spans():
    """Guards the same for the vision tower and the projector."""
    model = Step3VL.from_preset("tiny", seed=0)
    config = model.config.vision
    side = config.crop_size
    view = View(torch.zeros(50, 60, 3, dtype=torch.uint8), side)  # is resized
    events = recorded(lambda: model.vision([view]))
    assert outside(events) == set()
    products = {f"linear vision {name}" for name in ("patches", "qkv", "out", "proj")}
    ops = {"patchify", "layer_norm", "vision_attention", "linear_quick_gelu", "projector"}
    assert {family(name) for name in named(events)} >= {
        "vision pack",
        "vision layer",
        *products,
        *ops,
    }


def test_rounds_and_engine_steps():
    """Guards steps, their three parts, and rounds, which begin and end between steps."""
    model = Step3VL.from_preset("tiny", seed=0)
    engine = engine_for(model, kv_tokens=4096, max_running=4)
    pacore = Pacore(model, engine, [2], Sampling(3, ignore_eos=True))
    events = recorded(lambda: pacore.answer([{"role": "user", "content": "Count."}]))
    engine.executor.close()
    names = named(events)
    steps = [name for name in names if name.startswith("engine")]
    assert steps == [f"engine step {index}" for index in range(engine.stats.steps)]
    for part in ("schedule", "execute", "update"):
        assert names.count(part) == len(steps)
    assert outside(events) == set()
    ranges = {event.name: event.time_range for event in events}
    first, second = (ranges[f"round {number} of problem 0"] for number in range(2))
    assert first.start < ranges["engine step 0"].start < first.end <= second.start
    assert second.end > ranges[steps[-1]].end


def test_batch_invariant_in_a_span(interpreter, monkeypatch):
    """Guards the op that checks which form it has: with spans on, that is a wrapper."""
    import kernels.prefix_attention.op as module

    monkeypatch.setattr(module, "check_attention", lambda *args: None)
    monkeypatch.setattr(module, "prefix_attention_triton", lambda *args, **options: (options, None))
    q, k = torch.zeros(1, 1, 64), torch.zeros(1, 1, 16, 64)
    call = [q, KVPages(k, k), SimpleNamespace()]
    options = {"scale": 1.0, "batch_invariant": True}
    with use("torch"):
        passed = module.prefix_attention(*call, **options, impl="triton")
        with pytest.raises(ValueError, match="only impl 'triton' supports it"):
            module.prefix_attention(*call, **options, impl="eager")
    assert passed["batch_invariant"]


def test_crossing_ranges():
    """Guards rounds: several are open at once and end in any order."""
    with use("torch"), profile(activities=[ProfilerActivity.CPU]) as profiler:
        first, second = begin("round", 0), begin("round", 1)
        first()
        with span("step"):
            pass
        second()
    ranges = {event.name: event.time_range for event in profiler.events()}
    assert ranges["round 0"].end < ranges["step"].start < ranges["step"].end < ranges["round 1"].end


def test_nvtx_gets_names_in_our_domain(monkeypatch):
    """Guards the calls into the nvtx library, which most machines do not have."""
    log = []

    class Annotate:
        def __init__(self, message, domain):
            self.name = f"{domain}:{message}"

        def __enter__(self):
            log.append(f"push {self.name}")

        def __exit__(self, *error):
            log.append("pop")

    def start(message, domain):
        log.append(f"start {domain}:{message}")
        return message

    fake = SimpleNamespace(
        annotate=Annotate, start_range=start, end_range=lambda of: log.append(f"end {of}")
    )
    monkeypatch.setitem(sys.modules, "nvtx", fake)
    spans._ranges_of.cache_clear()
    with use("nvtx"):
        end = begin("round", 2)
        assert spanned("rms_norm", abs)(-1) == 1
        end()
    spans._ranges_of.cache_clear()
    assert log == ["start pacore:round 2", "push pacore:rms_norm", "pop", "end round 2"]


@pytest.mark.cli
def test_environment_and_imports():
    """Guards the environment variable for a profiler's child process, and modules that must not
    import torch when spans are off."""
    code = "import sys, kernels.runtime.spans as s;"
    code += "print('torch' in sys.modules, s._ranges is not None)"
    for mode, expected in (("", "False False"), ("off", "False False"), ("torch", "True True")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"PACORE_SPANS": mode, "PATH": ""},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.stdout.split("\n")[0] == expected, done.stderr


def test_family():
    """Guards tables by name: numbered layers and steps share a line; other names do not change."""
    assert family("decoder layer 31") == "decoder layer"
    assert family("round 0 of problem 7") == "round"
    assert family("linear gate_up") == "linear gate_up"
    assert family("linear_quick_gelu") == "linear_quick_gelu"
