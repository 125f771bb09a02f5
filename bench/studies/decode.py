"""One decode step of a whole decoder: rollouts over a shared prefix, each adding one token.

Timed from the tokens' embeddings to the next tokens. Weights and KV are random; the time does not
depend on them. Host work before the step (building its plan) is not timed. "decode_part" rows are a
step's time by part.

With model peers, all forms read the same tokens instead of random KV, so that their logits can be
compared. A peer's step ends at the logits: sampling is timed in our forms only.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from bench import model_peers
from bench.errors import compare
from bench.measure.devices import MAIN_DTYPE, parse_dtypes
from bench.measure.origin import origin
from bench.measure.rows import measured
from bench.measure.verdicts import NOT_RUN
from bench.model_peers.peer import LoadedPeer
from bench.model_peers.step_rows import begin, time_step
from bench.studies.breakdown import parts
from bench.studies.prefill import (
    PrefillCase,
    decoder_weights,
    random_ids,
    time_prefill,
)
from kernels.prefix_attention.op import EAGER_SCORES
from kernels.prefix_plan import PrefixPlan
from kernels.runtime.arithmetic import cdiv
from kernels.runtime.dtypes import dtype_name
from kernels.runtime.fp8 import quantise_e4m3
from kernels.sampling import sample
from model.config import PRESETS, Config, DecoderConfig
from model.decoder import Step
from model.errors import InputError
from model.kv_cache import PAGE_SIZE, KVCache
from model.memory import free_bytes
from model.step3vl import Step3VL
from model.terminal import add_rope_scaling, integer, track
from pacore_sched.answers.rounds import MAX_WIDTH
from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.scheduler import TOKEN_BUDGET
from pacore_sched.sched.step_batch import build_step_batch

FORMS = {"eager": "eager", "default": None}  # `impl` of all ops; None is the device's best
FP8 = "default, FP8 KV"  # the default form over pages of e4m3, on a GPU
MODELS = {"cpu": "smollm2-135m", "cuda": "step3-vl-10b"}
# Batches, prefixes and suffixes: as in a round of PaCoRe, and a single rollout.
SIZES = {"cpu": ((1, 16), (512,), (64,)), "cuda": ((16, 64, 1), (2048, 8192), (512,))}
PREFILL = {"cpu": (512,), "cuda": (2048,)}  # tokens of prompts


def forms_on(device_type: str) -> tuple[str, ...]:
    """The forms of a whole step that are timed, in order."""
    return (*FORMS, FP8) if device_type == "cuda" else tuple(FORMS)


@dataclass(frozen=True)
class DecodeCase:
    """`batch` rollouts of `suffix` tokens, the new one included, over `prefix` shared ones."""

    batch: int
    prefix: int
    suffix: int
    op: ClassVar[str] = "decode_step"

    @property
    def name(self) -> str:
        return f"B{self.batch} P{self.prefix} S{self.suffix}"

    @property
    def shape(self) -> dict[str, int]:
        return {"batch": self.batch, "prefix": self.prefix, "suffix": self.suffix}

    @property
    def tokens(self) -> int:
        """Tokens whose KV the step must read."""
        return self.prefix + self.batch * self.suffix

    def bytes(self, config: DecoderConfig, dtype: torch.dtype, fp8_kv: bool = False) -> int:
        """Bytes to move: every weight once (only the tokens' rows of the embedding) and every
        token's KV once."""
        weights = decoder_weights(config) + self.batch * config.hidden
        kv = config.kv_bytes_per_token(1 if fp8_kv else dtype.itemsize)
        if fp8_kv:  # the fp32 scales of a token's K and V in every head
            kv += 8 * config.layers * config.kv_heads
        return weights * dtype.itemsize + self.tokens * kv

    def flops(self, config: DecoderConfig) -> int:
        """Two per weight and rollout, plus attention's two products."""
        attention = 4 * config.layers * config.heads * config.head_dim
        return self.batch * (2 * decoder_weights(config) + attention * (self.prefix + self.suffix))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that choose the model, its steps and their forms."""
    parser.add_argument(
        "--model", metavar="PRESET", help=f"one of {', '.join(PRESETS)} (default: by device)"
    )
    add_rope_scaling(parser)
    for name, largest, what in (
        ("batch", MAX_WIDTH, "rollouts"),
        ("prefix", 10**6, "tokens that all rollouts share"),
        ("suffix", 10**6, "tokens of each rollout, the new one included"),
        ("prefill", 10**6, "read prompts of N tokens; alone, no decode step"),
    ):
        size = integer(1, largest)
        parser.add_argument(f"--{name}", nargs="+", type=size, default=(), metavar="N", help=what)
    impl_argument(parser)
    parser.add_argument(
        "--dtype", nargs="+", default=(), help="(default: float32 on a CPU, bfloat16 on a GPU)"
    )


def impl_argument(parser: argparse.ArgumentParser) -> None:
    """The option `--impl` of whole models."""
    parser.add_argument(
        "--impl",
        nargs="+",
        default=(),
        metavar="FORM",
        help="only these forms and model peers (default: ours, and peers that are installed):"
        f" {', '.join((*FORMS, *model_peers.PEERS))}",
    )


def run(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Rows of the requested decode steps and of their parts, and of the requested prompts."""
    config, dtypes = selected_config(options, device), selected_dtypes(options, device)
    cases: list[DecodeCase | PrefillCase] = [
        *selected_steps(options, device),
        *selected_prompts(options, device),
    ]
    forms, peers = model_peers.select(options.impl, forms_on(device.type), config, device)
    for dtype in dtypes:
        model, free = None, free_bytes(device)  # before any weights are allocated
        loaded: dict[str, LoadedPeer] = {}
        for case in track(cases, "decode"):
            needed = needed_bytes(config, case, dtype)
            if needed > free:
                reason = f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
                yield _skipped(config, case, device, dtype, reason)
                continue
            if model is None:
                model = Step3VL.from_preset(
                    config.name, device=device, dtype=dtype, rope_scaling=options.rope_scaling
                )
                loaded = model_peers.load(peers, model)
            if isinstance(case, PrefillCase):
                ours = {form: FORMS[form] for form in forms if form in FORMS}
                yield from time_prefill(model, case, ours, loaded)
            else:
                yield from time_decode(model, case, names=forms, breakdown=True, peers=loaded)


def selected_config(options: argparse.Namespace, device: torch.device) -> Config:
    """The requested preset and context. Raises InputError for what does not exist."""
    name = options.model or MODELS[device.type]
    if name not in PRESETS:
        raise InputError(f"unknown model {name!r}; choose one of {', '.join(PRESETS)}")
    config = PRESETS[name]
    scaling = options.rope_scaling
    return config if scaling is None else config.with_rope_scaling(scaling)


def selected_dtypes(options: argparse.Namespace, device: torch.device) -> tuple[torch.dtype, ...]:
    """The requested dtypes, or the device's main one. Raises InputError for an unknown dtype."""
    return parse_dtypes(options.dtype) or (MAIN_DTYPE[device.type],)


def selected_steps(options: argparse.Namespace, device: torch.device) -> list[DecodeCase]:
    """The requested decode steps: none if only prompts are requested.

    Raises InputError for steps beyond the model's context.
    """
    requested = (options.batch, options.prefix, options.suffix)
    if options.prefill and not any(requested):
        return []
    sizes = [
        values or default for values, default in zip(requested, SIZES[device.type], strict=True)
    ]
    tokens = max(sizes[1]) + max(sizes[2])
    _check_context(selected_config(options, device), "--prefix and --suffix make", tokens)
    return [DecodeCase(*size) for size in product(*sizes)]


def selected_prompts(options: argparse.Namespace, device: torch.device) -> list[PrefillCase]:
    """The requested prompts; those of PREFILL if no size at all is requested.

    Raises InputError for prompts beyond the model's context.
    """
    sizes = options.prefill
    if not any((sizes, options.batch, options.prefix, options.suffix)):
        sizes = PREFILL[device.type]
    _check_context(selected_config(options, device), "--prefill makes", max(sizes, default=0))
    return [PrefillCase(tokens) for tokens in sizes]


def _check_context(config: Config, what: str, tokens: int) -> None:
    context = config.decoder.max_positions
    if tokens > context:
        raise InputError(
            f"{what} {tokens:,} tokens; the context of {config.name} has {context:,}"
            " (--rope-scaling makes it longer)"
        )


def needed_bytes(config: Config, case: DecodeCase | PrefillCase, dtype: torch.dtype) -> int:
    """Memory for the weights, the KV pages and an FP8 copy of them, two sets of fp32 logits, and
    what the eager form gathers: scores, and twice a sequence's K and V for every query head, in
    fp32."""
    decoder, fp32 = config.decoder, 4
    kv = decoder.kv_bytes_per_token(dtype.itemsize)
    context, rows = case.tokens, TOKEN_BUDGET
    if isinstance(case, DecodeCase):
        context, rows = case.prefix + case.suffix, 1
    scores = min(EAGER_SCORES, rows * decoder.heads * context)
    eager = 4 * fp32 * (context * decoder.heads * decoder.head_dim + scores)
    logits = 8 * case.batch * config.decoder.vocab_size
    model = Step3VL(config, device="meta", dtype=dtype)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return weights + 2 * case.tokens * kv + logits + eager


def time_decode(
    model: Step3VL,
    case: DecodeCase,
    budget_s: float = 3.0,
    names: Sequence[str] | None = None,
    breakdown: bool = False,
    peers: Mapping[str, LoadedPeer] | None = None,
) -> list[dict]:
    """One row per form in `names` (by default `forms_on` the device) and per peer; with
    `breakdown`, also one row per form and part.

    Errors compare the logits with the eager ones. Leaves the model with the best form of every op.
    """
    config, decoder, device = model.config.decoder, model.decoder, model.device
    tokens = Tokens.of(case, model)
    step, cache = prepare(case, model, tokens if peers else None)
    names = forms_on(device.type) if names is None else names
    forms = {name: (FORMS[name], cache) for name in names if name != FP8}
    if FP8 in names:
        forms[FP8] = (None, _quantised(cache, model))
    ids = tokens.suffixes[:, -1]
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
    calls: dict[str, Callable] = {name: partial(next_tokens, *form) for name, form in forms.items()}
    rows = time_step(
        case,
        model,
        calls,
        errors,
        begin(peers or {}, lambda peer: peer.decode_step(tokens.prompt, tokens.suffixes)),
        expected,
        num_bytes=lambda name: case.bytes(config, model.dtype, name == FP8),
        budget_s=budget_s,
    )
    rows += _parts(model, case, calls) if breakdown else []
    model.set_impl(None)
    return rows


def _skipped(
    config: Config,
    case: DecodeCase | PrefillCase,
    device: torch.device,
    dtype: torch.dtype,
    reason: str,
) -> dict:
    row = measured(
        case.op,
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
    assert fp8.k_scale is not None and fp8.v_scale is not None
    for layer in range(len(cache.k)):
        fp8.k[layer], fp8.k_scale[layer] = quantise_e4m3(cache.k[layer])
        fp8.v[layer], fp8.v_scale[layer] = quantise_e4m3(cache.v[layer])
    return fp8


@dataclass(frozen=True)
class Tokens:
    """A step's tokens: prompt, int [P], and suffixes, int [B, S]. It reads the last column."""

    prompt: Tensor
    suffixes: Tensor

    @staticmethod
    def of(case: DecodeCase, model: Step3VL) -> "Tokens":
        """Random tokens, the same in every run."""
        ids = random_ids(case.tokens, model)
        return Tokens(ids[: case.prefix], ids[case.prefix :].view(case.batch, case.suffix))


def prepare(case: DecodeCase, model: Step3VL, tokens: Tokens | None = None) -> tuple[Step, KVCache]:
    """The step, and pages with the KV of the tokens before it; without tokens, random KV."""
    pages = cdiv(case.prefix, PAGE_SIZE) + case.batch * cdiv(case.suffix, PAGE_SIZE)
    cache = model.new_cache(pages)
    if tokens is None:
        generator = torch.Generator(model.device).manual_seed(0)
        for pages_of_layers in (cache.k, cache.v):
            pages_of_layers.normal_(generator=generator)
    tree = PrefixTree(pages, PAGE_SIZE)
    root = tree.add()
    tree.append(root, case.prefix)
    if tokens is not None:
        _read(tokens.prompt, _step(tree, [root], case.prefix, cache), model, cache)
    leaves = [tree.add(root) for _ in range(case.batch)]
    before = case.suffix - 1
    for leaf in leaves:
        tree.reserve(leaf, case.suffix)
        tree.append(leaf, before)
    if tokens is not None and before:
        step = _step(tree, leaves, before, cache)
        _read(tokens.suffixes[:, :-1].flatten(), step, model, cache)
    for leaf in leaves:
        tree.append(leaf, 1)
    return _step(tree, leaves, 1, cache), cache


def _step(tree: PrefixTree, nodes: Sequence[int], num_new: int, cache: KVCache) -> Step:
    """The step that writes the last `num_new` tokens of each node, one node after the other."""
    batch, device = build_step_batch(tree, [(node, num_new) for node in nodes]), cache.k.device
    plan = PrefixPlan.build(
        batch.plan_nodes,
        num_rows=len(batch.positions),
        num_pages=cache.num_pages,
        page_size=PAGE_SIZE,
        device=device,
    )
    positions, slots = (
        torch.tensor(values, device=device) for values in (batch.positions, batch.slots)
    )
    return Step(positions, slots, plan)


@torch.inference_mode()
def _read(ids: Tensor, step: Step, model: Step3VL, cache: KVCache) -> None:
    """Write the KV of tokens, with the best form of every op."""
    model.set_impl(None)
    model.decoder(model.decoder.embed(ids), step, cache)
