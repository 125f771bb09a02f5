"""`python -m bench memory`: the peak memory of a long prompt, next to its bound.

The engine reads the prompt in steps of at most `--chunk` tokens and samples one token. The peak is
what that takes besides weights and KV pages, which exist before: on a GPU of PyTorch's allocator,
on a CPU of the process's resident memory. The bound is `prefill_bytes`. A peak beyond it is a
failure. Buffers that libraries keep from earlier prompts of a command are not counted again: the
first row is the strictest. The default model on a CPU is as small as a decoder can be: attention
over 262,144 tokens takes it a minute.
"""

import argparse
import time
from collections.abc import Iterator

import torch

from bench import peak_memory
from bench.measure.devices import MAIN_DTYPE
from bench.measure.rows import measured
from bench.measure.verdicts import NOT_RUN
from bench.studies.prefill import PrefillCase
from kernels.runtime.arithmetic import cdiv
from model.config import PRESETS, Config, DecoderConfig, preset
from model.errors import InputError
from model.kv_cache import PAGE_SIZE, page_bytes
from model.memory import free_bytes, prefill_bytes
from model.step3vl import Step3VL
from model.terminal import add_rope_scaling, integer, track
from model.weights.random_init import random_init
from pacore_sched.answers.pacore import engine_for
from pacore_sched.engine.engine import Engine
from pacore_sched.engine.executor import ModelExecutor
from pacore_sched.sched.request import Sampling
from pacore_sched.sched.scheduler import TOKEN_BUDGET

SMALLEST = Config(
    "smallest",
    DecoderConfig(
        vocab_size=256,
        hidden=32,
        layers=1,
        heads=1,
        kv_heads=1,
        head_dim=16,
        mlp_width=64,
        max_positions=1 << 20,
    ),
)
MODELS = {"cpu": SMALLEST, "cuda": PRESETS["step3-vl-10b"]}
TOKENS = {"cpu": 262144, "cuda": 65535}  # and one sampled token
WARM_UP_TOKENS = 130  # loads libraries and their code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, prompts and chunks."""
    parser.add_argument(
        "--model",
        metavar="PRESET",
        help=f"one of {', '.join(PRESETS)} (default: on a CPU the smallest possible decoder)",
    )
    add_rope_scaling(parser)
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=integer(WARM_UP_TOKENS, 2**20 - 1),
        default=(),
        metavar="N",
        help="prompts of N tokens (default: 262144 on a CPU, 65535 on a GPU, or the context)",
    )
    parser.add_argument(
        "--chunk",
        type=integer(1, 10**6),
        default=TOKEN_BUDGET,
        metavar="N",
        help=f"the most tokens of a step (default: {TOKEN_BUDGET})",
    )


def run(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """A row per prompt. Raises InputError for prompts beyond the model's context, and where memory
    cannot be measured or is not enough."""
    config = preset(options.model) if options.model else MODELS[device.type]
    if options.rope_scaling is not None:
        config = config.with_rope_scaling(options.rope_scaling)
    context, dtype = config.decoder.max_positions, MAIN_DTYPE[device.type]
    lengths = options.tokens or (min(TOKENS[device.type], context - 1),)
    peak_memory.start(device)  # fails where memory cannot be measured
    if max(lengths) >= context:
        raise InputError(
            f"--tokens {max(lengths)} and a sampled token exceed the context of {config.name},"
            f" {context:,} tokens"
        )
    model = random_model(config, device, dtype)
    for tokens in track(lengths, "memory"):
        yield row(model, tokens, options.chunk)


def random_model(config: Config, device: torch.device, dtype: torch.dtype) -> Step3VL:
    """A text-only model of random weights. Raises InputError if they do not fit."""
    text_only = Config(config.name, config.decoder)
    weights = sum(p.nbytes for p in Step3VL(text_only, device="meta", dtype=dtype).parameters())
    _check_memory(f"the weights of {config.name}", weights, device)
    model = Step3VL(text_only, device=device, dtype=dtype)
    random_init(model.checkpoint_tensors(), seed=0)
    model.decoder.pack()
    return model


def row(model: Step3VL, tokens: int, chunk: int) -> dict:
    """The row of one prompt."""
    config, device, case = model.config.decoder, model.device, PrefillCase(tokens)
    pages = cdiv(tokens, PAGE_SIZE) + 2
    kv_bytes = pages * page_bytes(config, model.dtype)
    bound = prefill_bytes(config, tokens, chunk, model.dtype)
    _check_memory(f"a prompt of {tokens} tokens", kv_bytes + bound, device)
    engine = engine_for(
        model,
        kv_tokens=pages * PAGE_SIZE,
        max_running=1,
        token_budget=chunk,
        prefix_cache=False,
    )
    with engine.executor as executor, torch.inference_mode():
        for pool in (executor.cache.k, executor.cache.v):
            pool.zero_()  # now, so that it does not count as the prompt's
        _read(engine, WARM_UP_TOKENS)
        before = peak_memory.start(device)
        began = time.perf_counter()
        _read(engine, tokens)
        seconds = time.perf_counter() - began
        peak = peak_memory.peak(device) - before
    failure = "the peak exceeds the bound" if peak > bound else None
    measurement = measured(
        "prefill_memory",
        f"{model.config.name} {case.name} in steps of {chunk}",
        "default",
        device=device,
        dtype=model.dtype,
        num_bytes=case.bytes(config, model.dtype),
        flops=case.flops(config),
        verdict=NOT_RUN,
        shape={"model": model.config.name, "tokens": tokens, "chunk": chunk},
    )
    return measurement | {
        "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "kv_bytes": kv_bytes,
        "peak_bytes": peak,
        "bound_bytes": bound,
        "seconds": seconds,
        "failure": failure,
    }


def _read(engine: Engine[ModelExecutor], tokens: int) -> None:
    """Let the engine read a prompt of random ids and sample a token."""
    vocab = engine.executor.model.config.decoder.vocab_size
    ids = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    segment = engine.executor.segment(ids[:-1])
    engine.submit([segment], ids[-1], {0: 0}, Sampling(max_tokens=1, ignore_eos=True))
    while engine.busy:
        engine.step()


def _check_memory(what: str, needed: int, device: torch.device) -> None:
    if needed > (free := free_bytes(device)):
        raise InputError(f"{what}: needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
