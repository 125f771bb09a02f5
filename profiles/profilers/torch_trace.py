"""`python -m profiles torch`: a trace by PyTorch's profiler, on any machine, and its summary.

It traces one case of an op, or engine steps while rollouts decode over a shared prompt. The file is
a Chrome trace, for Perfetto or chrome://tracing.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.measure.devices import MAIN_DTYPE, parse_device
from bench.studies.decode import DecodeCase
from kernels.runtime.arithmetic import cdiv
from kernels.runtime.spans import span, use
from model.errors import InputError
from model.kv_cache import PAGE_SIZE
from model.step3vl import Step3VL
from model.terminal import add_threads
from model.text.files import check_regular, check_target
from pacore_sched.answers.pacore import engine_for
from pacore_sched.sched.request import Sampling
from profiles.profilers import trace_summary
from profiles.profilers.exports import read_text
from profiles.profilers.launch import CALLS, WARM_UP, add_case_arguments, prepared

DECODE = {
    "cpu": ("tiny", DecodeCase(4, 256, 16)),
    "cuda": ("step3-vl-10b", DecodeCase(16, 2048, 128)),
}
EPILOG = """\
The profiler costs a few microseconds per operator: use its times for shares, and `python -m bench`
for times. Engine steps run op by op, so that each op has its kernels; --graphs runs them as in
production, where all kernels of a replay belong to "execute".

examples:
  python -m profiles torch --out decode.json
  python -m profiles torch --op vision_attention --out attention.json
  python -m profiles torch --summarise decode.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add_case_arguments(parser, required=False)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the trace to write")
    parser.add_argument(
        "--steps", type=CALLS, default=3, metavar="N", help="steps, or calls of an op (default: 3)"
    )
    parser.add_argument("--preset", help="the model that decodes (default: tiny; on a GPU the 10B)")
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs, as in production")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    add_threads(parser)
    parser.add_argument(
        "--summarise", type=Path, metavar="FILE.json", help="only summarise this trace"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document, no tables")


def run(options: argparse.Namespace) -> int:
    """Record and summarise. Raises InputError without a file to write or read."""
    path = options.summarise
    if path is None:
        path = options.out
        if path is None:
            raise InputError("no file for the trace: pass --out FILE.json")
        if options.threads:
            torch.set_num_threads(options.threads)
        _record(options, parse_device(options.device))
    try:
        summary = trace_summary.summarise(_read(path), path.name)
    except InputError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        text = f"{path} is not a trace of PyTorch's profiler: its events lack fields or have others"
        raise InputError(text) from error
    if options.json:
        print(json.dumps({"trace": str(path)} | summary))
    else:
        trace_summary.display(summary, path.name)
    return 0


def _record(options: argparse.Namespace, device: torch.device) -> None:
    if options.op:
        name, call = prepared(options, device)
        with torch.inference_mode():
            trace(call, options.steps, device, options.out)
        print(name)
        return
    preset, case = DECODE[device.type]
    preset = options.preset or preset
    with decoding(preset, case, options.steps, device, options.graphs) as step:
        trace(step, options.steps, device, options.out)
    print(f"{options.steps} steps of {preset}, {case.name}")


def trace(call: Callable[[], object], calls: int, device: torch.device, path: Path) -> None:
    """Warm up, profile `calls` calls with spans, and write the trace.

    Raises InputError if the file cannot be written.
    """
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    check_target(path)
    for _ in range(WARM_UP):
        call()
    with use("torch"), profile(activities=activities) as profiler:
        for index in range(calls):
            with span("call", index):
                call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))


@contextmanager
def decoding(
    preset: str, case: DecodeCase, steps: int, device: torch.device, graphs: bool
) -> Iterator[Callable[[], object]]:
    """Yields the step of an engine in which all rollouts decode."""
    model = Step3VL.from_preset(preset, device=device, dtype=MAIN_DTYPE[device.type])
    tokens = case.suffix + WARM_UP + steps + 2
    pages = cdiv(case.prefix, PAGE_SIZE) + case.batch * (cdiv(tokens, PAGE_SIZE) + 1)
    engine = engine_for(model, kv_tokens=pages * PAGE_SIZE, max_running=case.batch)
    with engine.executor as executor:
        if not graphs:
            executor.graphs.enabled = False
        prompt = [index % model.config.decoder.vocab_size for index in range(case.prefix)]
        group = engine.submit(
            [executor.segment(prompt)],
            0,
            {index: index for index in range(case.batch)},
            Sampling(tokens, ignore_eos=True),
        )
        while any(len(rollout.tokens) < case.suffix for rollout in group.rollouts):
            engine.step()
        yield engine.step


def _read(path: Path) -> dict:
    check_regular(path)
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
