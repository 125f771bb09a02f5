"""One decode step of a whole decoder: rollouts over a shared prefix, each adding one token.

Timed from the tokens' embeddings to the next tokens. Weights are random; the time does not depend
on them. Host work before the step (building its plan) is not timed. "decode_part" rows are a step's
time by part.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from bench.breakdown import parts
from bench.numerics import Verdict, compare
from bench.ops import MAIN_DTYPE, NOT_RUN, parse_dtypes
from bench.rows import measured, origin, with_speedups
from bench.show import times, titled
from bench.timing import measure
from kernels.prefix_plan import PrefixPlan
from kernels.runtime.arithmetic import cdiv
from kernels.runtime.dtypes import dtype_name
from kernels.runtime.fp8 import quantise_e4m3
from kernels.sampling import sample
from model.config import PRESETS, Config, DecoderConfig
from model.decoder import Decoder, Step
from model.errors import InputError
from model.impls import impl_per_op
from model.kv_cache import PAGE_SIZE, KVCache
from model.memory import free_bytes
from model.step3vl import Step3VL
from model.terminal import integer, track
from pacore_sched.answers.rounds import MAX_WIDTH
from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.step_batch import build_step_batch

FORMS = {"eager": "eager", "default": None}  # `impl` of all ops; None is the device's best
FP8 = "default, FP8 KV"  # the default form over pages of e4m3, on a GPU
MODELS = {"cpu": "smollm2-135m", "cuda": "step3-vl-10b"}
# Batches, prefixes and suffixes: as in a round of PaCoRe, and a single rollout.
SIZES = {"cpu": ((1, 16), (512,), (64,)), "cuda": ((16, 64, 1), (2048, 8192), (512,))}


def forms_on(device_type: str) -> tuple[str, ...]:
    """The forms of a whole step that are timed, in order."""
    return (*FORMS, FP8) if device_type == "cuda" else tuple(FORMS)


@dataclass(frozen=True)
class DecodeCase:
    """`batch` rollouts of `suffix` tokens, the new one included, over `prefix` shared ones."""

    batch: int
    prefix: int
    suffix: int

    @property
    def name(self) -> str:
        return f"B{self.batch} P{self.prefix} S{self.suffix}"

    @property
    def tokens(self) -> int:
        """Tokens whose KV the step must read."""
        return self.prefix + self.batch * self.suffix

    def bytes(self, config: DecoderConfig, dtype: torch.dtype, fp8_kv: bool = False) -> int:
        """Bytes to move: every weight once (only the tokens' rows of the embedding) and every
        token's KV once."""
        weights = _weights(config) + self.batch * config.hidden
        kv = config.kv_bytes_per_token(1 if fp8_kv else dtype.itemsize)
        if fp8_kv:  # the fp32 scales of a token's K and V in every head
            kv += 8 * config.layers * config.kv_heads
        return weights * dtype.itemsize + self.tokens * kv

    def flops(self, config: DecoderConfig) -> int:
        """Two per weight and rollout, plus attention's two products."""
        attention = 4 * config.layers * config.heads * config.head_dim
        return self.batch * (2 * _weights(config) + attention * (self.prefix + self.suffix))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that choose the model and its steps."""
    parser.add_argument(
        "--model", metavar="PRESET", help=f"one of {', '.join(PRESETS)} (default: by device)"
    )
    for name, largest, what in (
        ("batch", MAX_WIDTH, "rollouts"),
        ("prefix", 10**6, "tokens that all rollouts share"),
        ("suffix", 10**6, "tokens of each rollout, the new one included"),
    ):
        size = integer(1, largest)
        parser.add_argument(f"--{name}", nargs="+", type=size, default=(), metavar="N", help=what)
    parser.add_argument(
        "--dtype", nargs="+", default=(), help="(default: float32 on a CPU, bfloat16 on a GPU)"
    )


def run(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Rows of the requested steps and of their parts."""
    name, dtypes, cases = selected_steps(options, device)
    for dtype in dtypes:
        model, free = None, free_bytes(device)  # before any weights are allocated
        for case in track(cases, "decode"):
            needed = needed_bytes(PRESETS[name], case, dtype)
            if needed > free:
                reason = f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
                yield _skipped(PRESETS[name], case, device, dtype, reason)
                continue
            model = model or Step3VL.from_preset(name, device=device, dtype=dtype)
            yield from time_decode(model, case, breakdown=True)


def selected_steps(
    options: argparse.Namespace, device: torch.device
) -> tuple[str, tuple[torch.dtype, ...], list[DecodeCase]]:
    """The requested preset, dtypes and steps. Raises InputError for an unknown preset or dtype, or
    steps beyond the model's context."""
    name = options.model or MODELS[device.type]
    if name not in PRESETS:
        raise InputError(f"unknown model {name!r}; choose one of {', '.join(PRESETS)}")
    requested = (options.batch, options.prefix, options.suffix)
    sizes = [
        values or default for values, default in zip(requested, SIZES[device.type], strict=True)
    ]
    context = PRESETS[name].decoder.max_positions
    if (tokens := max(sizes[1]) + max(sizes[2])) > context:
        raise InputError(
            f"--prefix and --suffix make {tokens:,} tokens; the context of {name} has {context:,}"
        )
    dtypes = parse_dtypes(options.dtype) or (MAIN_DTYPE[device.type],)
    return name, dtypes, [DecodeCase(*size) for size in product(*sizes)]


def needed_bytes(config: Config, case: DecodeCase, dtype: torch.dtype) -> int:
    """Memory for the weights, the KV pages and an FP8 copy of them, and two sets of fp32 logits."""
    kv = config.decoder.kv_bytes_per_token(dtype.itemsize)
    logits = 8 * case.batch * config.decoder.vocab_size
    model = Step3VL(config, device="meta", dtype=dtype)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return weights + 2 * case.tokens * kv + logits


def time_decode(
    model: Step3VL,
    case: DecodeCase,
    budget_s: float = 3.0,
    names: Sequence[str] = (),
    breakdown: bool = False,
) -> list[dict]:
    """One row per form in `names` (`forms_on` the device if empty); with `breakdown`, also one row
    per form and part.

    Errors compare the logits with the eager ones. Leaves the model with the best form of every op.
    """
    config, decoder, device = model.config.decoder, model.decoder, model.device
    step, cache = prepare(case, model)
    names = names or forms_on(device.type)
    forms = {name: (FORMS[name], cache) for name in names if name != FP8}
    if FP8 in names:
        forms[FP8] = (None, _quantised(cache, model))
    ids = torch.arange(case.batch, device=device) % config.vocab_size
    seeds = torch.arange(case.batch, device=device)

    def logits(impl: str | None, cache: KVCache) -> Tensor:
        model.set_impl(impl)
        return decoder.logits(decoder(decoder.embed(ids), step, cache))

    def next_tokens(impl: str | None, cache: KVCache) -> Tensor:
        drawn = logits(impl, cache)
        return sample(drawn, seeds, step.positions, temperature=1.0, impl=impl)[0]

    with torch.inference_mode():
        expected = logits("eager", cache)
        errors = {name: compare(logits(*form), expected) for name, form in forms.items()}
    calls = {name: partial(next_tokens, *form) for name, form in forms.items()}
    timings = measure(
        {name: lambda _, call=call: call() for name, call in calls.items()},
        device=device,
        budget_s=budget_s,
    )
    rows = [
        measured(
            "decode_step",
            f"{model.config.name} {case.name}",
            name,
            device=device,
            dtype=model.dtype,
            num_bytes=case.bytes(config, model.dtype, name == FP8),
            flops=case.flops(config),
            verdict=Verdict(errors[name].max, errors[name].rms, None),
            timing=timings[name],
        )
        for name in forms
    ]
    timed_rows = with_speedups(rows) + (_parts(model, case, calls) if breakdown else [])
    model.set_impl(None)
    return timed_rows


def _skipped(
    config: Config, case: DecodeCase, device: torch.device, dtype: torch.dtype, reason: str
) -> dict:
    row = measured(
        "decode_step",
        f"{config.name} {case.name}",
        "all",
        device=device,
        dtype=dtype,
        num_bytes=case.bytes(config.decoder, dtype),
        flops=case.flops(config.decoder),
        verdict=replace(NOT_RUN, skipped=reason),
    )
    return row | {"skipped": reason}


def _parts(model: Step3VL, case: DecodeCase, calls: dict[str, Callable]) -> list[dict]:
    with torch.inference_mode():
        by_form = {name: parts(call, model.device) for name, call in calls.items()}
    return [
        {
            "op": "decode_part",
            "case": f"{model.config.name} {case.name}",
            "impl": name,
            "dtype": dtype_name(model.dtype),
            "part": part,
            "median_us": us,
            "failure": None,
            **origin(model.device),
        }
        for name, parts_us in by_form.items()
        for part, us in sorted(parts_us.items(), key=lambda item: -item[1])
    ]


def _quantised(cache: KVCache, model: Step3VL) -> KVCache:
    """The cache's values in pages of e4m3."""
    fp8 = model.new_cache(cache.num_pages, torch.float8_e4m3fn)
    for layer in range(len(cache.k)):
        fp8.k[layer], fp8.k_scale[layer] = quantise_e4m3(cache.k[layer])
        fp8.v[layer], fp8.v_scale[layer] = quantise_e4m3(cache.v[layer])
    return fp8


def prepare(case: DecodeCase, model: Step3VL) -> tuple[Step, KVCache]:
    """The step, and KV pages filled with random numbers."""
    device = model.device
    pages = cdiv(case.prefix, PAGE_SIZE) + case.batch * cdiv(case.suffix, PAGE_SIZE)
    tree = PrefixTree(pages, PAGE_SIZE)
    root = tree.add()
    tree.append(root, case.prefix)
    leaves = [tree.add(root) for _ in range(case.batch)]
    for leaf in leaves:
        tree.append(leaf, case.suffix)
    batch = build_step_batch(tree, [(leaf, 1) for leaf in leaves])
    plan = PrefixPlan.build(
        batch.plan_nodes,
        num_rows=case.batch,
        num_pages=pages,
        page_size=PAGE_SIZE,
        device=device,
    )
    cache = model.new_cache(pages)
    generator = torch.Generator(device).manual_seed(0)
    for pages_of_layers in (cache.k, cache.v):
        pages_of_layers.normal_(generator=generator)
    positions, slots = (
        torch.tensor(values, device=device) for values in (batch.positions, batch.slots)
    )
    return Step(positions, slots, plan), cache


def _weights(config: DecoderConfig) -> int:
    """How many weights every step reads: all of the decoder's but the embedding."""
    with torch.device("meta"):
        decoder = Decoder(config, impl=impl_per_op(None), device="meta", dtype=torch.float32)
    tensors = decoder.checkpoint_tensors()
    return sum(t.numel() for name, t in tensors.items() if "embed_tokens" not in name) + (
        config.vocab_size * config.hidden if config.tied_embeddings else 0
    )


def display(rows: Sequence[dict]) -> None:
    """The steps as a table, and each form's time by part."""
    times([row for row in rows if row["op"] == "decode_step"])
    steps: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        if row["op"] == "decode_part":
            steps.setdefault((row["case"], row["impl"], row["dtype"]), []).append(row)
    lines = []
    for step, step_rows in steps.items():
        total = sum(row["median_us"] for row in step_rows)
        shares = (f"{row['part']} {row['median_us'] / total:.0%}" for row in step_rows)
        lines.append([*step, f"{total:,.0f}", ", ".join(shares)])
    if lines:
        header = ("case", "form", "dtype", " us, profiled", "time by part")
        titled("decode steps by part", rows, header, lines)
