"""Options that several commands share, and what is made of them: a model, an engine, a sampling."""

import argparse
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kernels.runtime.dispatch import IMPLS
from model.config import PRESETS, SamplingConfig
from model.errors import InputError
from model.impls import DTYPES
from model.kv_cache import PAGE_SIZE
from model.step3vl import Step3VL
from model.vision.image import Views, preprocess
from pacore_sched.answers.pacore import engine_for
from pacore_sched.engine.engine import Engine
from pacore_sched.engine.executor import ModelExecutor
from pacore_sched.engine.stopping import checked_stops
from pacore_sched.sched.policy import KNOW_LENGTHS, POLICIES
from pacore_sched.sched.request import Sampling

if TYPE_CHECKING:
    from PIL import Image

KV_DTYPES = {"fp8": torch.float8_e4m3fn}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2-135m", help="preset, checkpoint folder or GGUF")
    parser.add_argument("--impl", help=f"how ops run: {', '.join(IMPLS)}; default: the best here")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, else bfloat16")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-tokens", type=int, default=512, help="per rollout")
    parser.add_argument(
        "--temperature", type=float, help=f"0 is greedy; {_default_from_model('temperature')}"
    )
    parser.add_argument(
        "--top-k", type=int, help=f"0 keeps all tokens; {_default_from_model('top_k')}"
    )
    parser.add_argument(
        "--top-p", type=float, help=f"1 keeps all tokens; {_default_from_model('top_p')}"
    )
    parser.add_argument(
        "--stop", action="append", default=[], help="text that ends a rollout; may be repeated"
    )
    parser.add_argument("--seed", type=int, default=0)


def add_pacore_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--widths", default="16", help="rollouts per round, e.g. 16 or 32,4; '' is 1"
    )
    parser.add_argument("--template", help="jinja2 file for the synthesis prompt")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    names = [name for name in POLICIES if name not in KNOW_LENGTHS]
    parser.add_argument(
        "--policy", default="later-round-first", help=f"whose turn it is: {', '.join(names)}"
    )
    parser.add_argument("--max-running", type=int, default=256, help="rollouts decoding at once")
    parser.add_argument(
        "--kv-dtype", choices=KV_DTYPES, help="default: the model's; fp8 halves what is read"
    )
    parser.add_argument("--kv-tokens", type=int, help="default: as many as memory has room for")
    parser.add_argument(
        "--host-kv-tokens",
        type=int,
        default=0,
        help="preempted rollouts keep their KV in the host's memory, up to so many tokens;"
        " default: it is computed again",
    )
    parser.add_argument(
        "--speculate",
        type=int,
        default=0,
        help="draft from siblings while so few rollouts run; default: never",
    )


def load_model(options: argparse.Namespace) -> Step3VL:
    """The model that --model, --device, --dtype and --impl name."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        usable = torch.empty(0, device=device).device.type in ("cpu", "cuda")
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        raise InputError(f"device {device!r} cannot be used on this machine")
    default = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    dtype = DTYPES[options.dtype] if options.dtype else default
    exists = Path(options.model).exists()
    load = Step3VL.from_pretrained if exists else Step3VL.from_preset
    return load(options.model, device=device, dtype=dtype, impl=options.impl)


def views_of(images: Iterable["Image.Image"], model: Step3VL) -> list[Views]:
    """Images as the model takes them. Raises InputError if it takes none."""
    vision = model.config.vision
    if vision is None:
        raise InputError(f"model {model.config.name} has no vision tower: it takes no images")
    return [preprocess(image, vision) for image in images]


def make_engine(
    options: argparse.Namespace, model: Step3VL, *, problems: int, width: int
) -> Engine[ModelExecutor]:
    """The engine that the options describe, no larger than needed for so many problems and
    rollouts per round. Raises InputError for what is wrong with the options."""
    _check(
        (
            (options.max_running >= 1, "--max-running", "1"),
            (options.kv_tokens is None or options.kv_tokens >= 1, "--kv-tokens", "1"),
            (options.speculate >= 0, "--speculate", "0"),
            (options.host_kv_tokens >= 0, "--host-kv-tokens", "0"),
        )
    )
    context = model.config.decoder.max_positions
    running = min(options.max_running, problems * width)
    own = min(options.max_tokens, context) + PAGE_SIZE
    return engine_for(
        model,
        policy=options.policy,
        max_running=running,
        kv_dtype=KV_DTYPES.get(options.kv_dtype),
        kv_tokens=options.kv_tokens,
        most_tokens=running * own + min(problems, running) * (context + 2 * PAGE_SIZE),
        speculate=options.speculate,
        host_pages=options.host_kv_tokens // PAGE_SIZE,
    )


def check_sampling(options: argparse.Namespace) -> None:
    """Raise InputError for a sampling option out of its range; one that is None is not checked."""
    temperature, top_p = options.temperature, options.top_p
    _check(
        (
            (options.max_tokens >= 1, "--max-tokens", "1"),
            (options.top_k is None or options.top_k >= 0, "--top-k", "0"),
        )
    )
    if not (temperature is None or temperature == 0 or 1e-6 <= temperature <= 1e6):
        raise InputError("--temperature must be 0, or from 1e-6 to 1e6")
    if not (top_p is None or 0 < top_p <= 1):
        raise InputError("--top-p must be above 0 and at most 1")
    checked_stops(options.stop)


def sampling_for(options: argparse.Namespace, default: SamplingConfig) -> Sampling:
    """The sampling that `check_sampling` has checked; `default` for options that are None."""
    options_by_name = {field.name: getattr(options, field.name) for field in fields(default)}
    given = {name: value for name, value in options_by_name.items() if value is not None}
    config = replace(default, **given)
    return Sampling(
        max_tokens=options.max_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        stop=checked_stops(options.stop),
    )


def _default_from_model(name: str) -> str:
    """The help text for a sampling option's default: where it comes from, and the presets'."""
    default = getattr(SamplingConfig(), name)
    values = {preset: getattr(config.sampling, name) for preset, config in PRESETS.items()}
    presets = [f"{preset} {value:g}" for preset, value in values.items() if value != default]
    sources = ", ".join([*presets, "a checkpoint's generation_config.json"])
    return f"default: the model's: {sources}, else {default:g}"


def _check(rules: Iterable[tuple[bool, str, str]]) -> None:
    """Raise InputError for the first option that is below its least value."""
    for ok, name, least in rules:
        if not ok:
            raise InputError(f"{name} must be at least {least}")
