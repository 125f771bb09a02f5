"""Options that several commands share, and the model, engine and sampling built from them."""

import argparse
import os
from copy import copy
from dataclasses import fields, replace
from math import inf
from pathlib import Path

import torch

from kernels.runtime.dispatch import IMPLS
from model.config import PRESETS, SamplingConfig, unknown_model
from model.errors import InputError
from model.impls import DTYPES
from model.kv_cache import PAGE_SIZE
from model.step3vl import Step3VL
from model.terminal import add_rope_scaling, add_threads, integer, real
from model.text.chat_template import CHATML
from model.text.files import read_text
from pacore_sched.answers.pacore import engine_for
from pacore_sched.answers.rounds import MAX_WIDTH
from pacore_sched.engine.engine import Engine
from pacore_sched.engine.executor import ModelExecutor
from pacore_sched.engine.stopping import checked_stops
from pacore_sched.sched.policy import ORACLES, POLICIES
from pacore_sched.sched.request import Sampling
from pacore_sched.sched.view_queue import DEFAULT_VISION_BUDGET, VISION_BUDGETS

KV_DTYPES = {"fp8": torch.float8_e4m3fn}
COUNT, WIDTH = integer(1, 10**9), integer(1, MAX_WIDTH)  # types of options
SEED = integer(-(2**63), 2**63 - 1)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="smollm2-135m",
        help="preset, checkpoint folder or GGUF (default: smollm2-135m)",
    )
    parser.add_argument(
        "--chat-template",
        help="jinja2 file, or the name of one of the model's chat templates, or chatml, which takes"
        " tools; default: default",
    )
    parser.add_argument(
        "--impl", help=f"one of {', '.join(IMPLS)}; default: the best on the device"
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, else bfloat16")
    add_rope_scaling(parser)
    add_threads(parser)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-tokens", type=COUNT, default=512, help="limit per rollout (default: 512)"
    )
    parser.add_argument(
        "--temperature",
        type=_temperature,
        help=f"0 is greedy; {_default_from_model('temperature')}",
    )
    parser.add_argument(
        "--top-k",
        type=integer(0, 10**9),
        help=f"0 keeps all tokens; {_default_from_model('top_k')}",
    )
    parser.add_argument(
        "--top-p",
        type=real(0, 1, exclusive=True),
        help=f"1 keeps all tokens; {_default_from_model('top_p')}",
    )
    parser.add_argument(
        "--stop", action="append", default=[], help="string that ends a rollout; may be repeated"
    )
    parser.add_argument("--seed", type=SEED, default=0, help="seed of all draws (default: 0)")


def add_pacore_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--widths",
        default="16",
        help="rollouts per round, such as 32,4 (default: 16); '': only the synthesis",
    )
    parser.add_argument("--template", help="jinja2 file for the synthesis prompt")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    names = [name for name in POLICIES if name not in ORACLES]
    parser.add_argument(
        "--policy",
        default="later-round-first",
        help=f"one of {', '.join(names)} (default: later-round-first)",
    )
    parser.add_argument(
        "--max-running",
        type=WIDTH,
        default=256,
        help="limit of decoding rollouts (default: 256)",
    )
    parser.add_argument(
        "--kv-dtype",
        choices=KV_DTYPES,
        help="dtype of the KV; default: the model's; fp8 halves the bytes read",
    )
    parser.add_argument(
        "--kv-tokens", type=COUNT, help="capacity of the KV cache; default: what fits in memory"
    )
    parser.add_argument(
        "--host-kv-tokens",
        type=integer(0, 10**9),
        default=0,
        help="keep the KV of preempted rollouts in host memory, up to this many tokens;"
        " default: recompute it",
    )
    parser.add_argument(
        "--speculate",
        type=integer(0, MAX_WIDTH),
        default=0,
        help="draft from sibling rollouts while at most this many rollouts run; default: never",
    )
    parser.add_argument(
        "--vision-budget",
        choices=VISION_BUDGETS,
        default=DEFAULT_VISION_BUDGET,
        help="how much longer decode steps may take while images are encoded:"
        f" {', '.join(map(_slowdown, VISION_BUDGETS))} (default: {DEFAULT_VISION_BUDGET})",
    )
    parser.add_argument(
        "--vision-batch",
        type=integer(0, 10**9),
        metavar="PATCHES",
        help="encode images of all requests together, up to this many patches; 0: each alone, so"
        " that its bits do not depend on others; default: 16384 on a GPU, else 0",
    )
    parser.add_argument(
        "--no-prefix-cache",
        action="store_true",
        help="compute every prompt; default: find the KV and images of earlier prompts again",
    )


def add_replica_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--replicas",
        type=_replicas,
        help="run this many replicas of the model on Ray: N, or MIN-MAX to begin with MIN and let"
        " others join as the cluster has room",
    )
    parser.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="head node of the Ray cluster; default: one on this machine, for this run",
    )


def resources(options: argparse.Namespace) -> tuple[float, float]:
    """(GPUs, CPUs) of a replica: a GPU if the cluster can be expected to have one."""
    here = options.ray_address is None and not torch.cuda.is_available()
    on_cpu = here if options.device is None else torch.device(options.device).type == "cpu"
    return (0.0, float(options.threads or 1)) if on_cpu else (1.0, 1.0)


def for_workers(options: argparse.Namespace) -> argparse.Namespace:
    """The options for replicas: their processes may have another working directory."""
    options = copy(options)
    for name in ("model", "chat_template", "allowed_local_media_path"):
        if (value := getattr(options, name, None)) and os.path.exists(value):
            setattr(options, name, os.path.abspath(value))
    gpus, cpus = resources(options)
    options.threads = options.threads or (None if gpus else int(cpus))
    return options


def check_model(model: str) -> None:
    """Raise InputError unless --model is a preset or exists."""
    if not os.path.exists(model) and model not in PRESETS:  # unlike Path's, false for long names
        raise unknown_model(model)


def load_model(options: argparse.Namespace) -> Step3VL:
    """The model described by --model, --rope-scaling, --device, --dtype, --impl and
    --chat-template; it computes with --threads."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        is_usable = torch.empty(0, device=device).device.type in ("cpu", "cuda")
    except (RuntimeError, AssertionError):
        is_usable = False
    if not is_usable:
        raise InputError(f"device {device!r} cannot be used on this machine")
    default = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    dtype = DTYPES[options.dtype] if options.dtype else default
    check_model(options.model)
    load = Step3VL.from_pretrained if os.path.exists(options.model) else Step3VL.from_preset
    file_text = _chat_template_text(options.chat_template)  # before weights, which take minutes
    model = load(
        options.model,
        device=device,
        dtype=dtype,
        impl=options.impl,
        rope_scaling=options.rope_scaling,
    )
    if options.chat_template:
        templates = {"chatml": CHATML} | model.tokenizer.chat_templates
        if file_text is None and options.chat_template not in templates:
            raise InputError(
                f"--chat-template {options.chat_template}: there is no such file, and the chat"
                f" templates for {options.model} are: {', '.join(sorted(templates))}"
            )
        text = templates[options.chat_template] if file_text is None else file_text
        model.tokenizer.chat_templates = {"default": text}
    return model


def make_engine(
    options: argparse.Namespace,
    model: Step3VL,
    *,
    problems: int | None = None,
    width: int = 1,
    replicas: int = 1,
) -> Engine[ModelExecutor]:
    """The engine described by the options, no larger than `problems` problems of at most `width`
    rollouts per round need; None: any number. `replicas` have the device's memory in common.

    Raises InputError if there is not enough memory.
    """
    context = model.config.decoder.max_positions
    running, max_kv_tokens = options.max_running, None
    if problems is not None:
        running = min(running, problems * width)
        rollout_tokens = min(options.max_tokens, context) + PAGE_SIZE
        prompts = min(problems, running) * (context + 2 * PAGE_SIZE)
        max_kv_tokens = running * rollout_tokens + prompts
    return engine_for(
        model,
        policy=options.policy,
        max_running=running,
        kv_dtype=KV_DTYPES.get(options.kv_dtype),
        kv_tokens=options.kv_tokens,
        max_kv_tokens=max_kv_tokens,
        speculate=options.speculate,
        replicas=replicas,
        host_pages=options.host_kv_tokens // PAGE_SIZE,
        prefix_cache=not options.no_prefix_cache,
        vision_budget=options.vision_budget,
        vision_batch=options.vision_batch,
    )


def sampling_for(options: argparse.Namespace, default: SamplingConfig) -> Sampling:
    """The sampling described by the options; `default` where an option is None."""
    values = {field.name: getattr(options, field.name) for field in fields(default)}
    config = replace(default, **{n: value for n, value in values.items() if value is not None})
    return Sampling(
        max_tokens=options.max_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        stop=checked_stops(options.stop),
    )


def _chat_template_text(choice: str | None) -> str | None:
    """The text of the file that --chat-template names; None if it names a template, even one with
    the name of a folder."""
    text = read_text(Path(choice)) if choice and not os.path.isdir(choice) else None
    if text is None and choice and choice.endswith((".jinja", ".jinja2", ".j2")):
        raise InputError(f"--chat-template {choice}: there is no such file")
    return text


def _replicas(text: str) -> tuple[int, int]:
    """The type of --replicas: (the fewest, the most)."""
    count = integer(1, 4096)
    least, dash, most = text.partition("-")
    bounds = count(least), count(most if dash else least)
    if bounds[0] > bounds[1]:
        raise argparse.ArgumentTypeError(f"{text}: {least} is more than {most}")
    return bounds


def _temperature(text: str) -> float:
    """The type of --temperature: 0, or from 1e-6 to 1e6, so that scaled logits stay finite."""
    value = real(0, 1e6)(text)
    if 0 < value < 1e-6:
        raise argparse.ArgumentTypeError(f"{text} is neither 0 nor a number from 1e-6 to 1e6")
    return value


def _slowdown(budget: str) -> str:
    """Help text about a vision budget."""
    times = VISION_BUDGETS[budget]
    return f"{budget} (any)" if times == inf else f"{budget} ({times:g}x)"


def _default_from_model(name: str) -> str:
    """Help text about a sampling option's default: the presets' values, and the other sources."""
    default = getattr(SamplingConfig(), name)
    values = {preset: getattr(config.sampling, name) for preset, config in PRESETS.items()}
    presets = [f"{preset} {value:g}" for preset, value in values.items() if value != default]
    sources = ", ".join([*presets, "a checkpoint's generation_config.json"])
    return f"default: the model's: {sources}, else {default:g}"
