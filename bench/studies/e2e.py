"""End-to-end runs: a PaCoRe question, and a photo up to its first logits; eager and default ops.

Model peers answer the question, too: their rounds have the first round's prompt, cut or repeated to
our rounds' lengths, and each of their rollouts has as many tokens as ours has.

On a CPU: SmolLM2 with its real weights and a question about a text of some 1,500 tokens, and a
photo through `tiny`. On a GPU: the 10B with random weights for both. The question is asked once per
form, because it takes a hundred steps and more; the photo is timed like any op.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import NamedTuple

import torch

from bench import model_peers
from bench.errors import compare
from bench.inputs.views import tower_flops
from bench.measure.devices import MAIN_DTYPE
from bench.measure.origin import LICENCE
from bench.measure.rows import measured, with_speedups
from bench.measure.timing import Timing, measure
from bench.measure.verdicts import MODEL_TOLERANCE, NOT_RUN, Verdict, judged
from bench.model_peers.peer import LoadedPeer
from bench.studies.decode import FORMS
from kernels.runtime.arithmetic import cdiv
from model.config import PRESETS
from model.errors import InputError
from model.step3vl import Step3VL
from model.terminal import progress
from model.text.prompt import build_prompt
from model.vision.image import load_image, preprocess
from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.live import Answer
from pacore_sched.answers.pacore import Pacore, engine_for
from pacore_sched.engine.engine import Engine
from pacore_sched.sched.request import Sampling

MODELS = {"cpu": ("smollm2-135m", "tiny"), "cuda": ("step3-vl-10b", "step3-vl-10b")}
WIDTHS, PROMPT_TOKENS = (16,), 1500
MAX_TOKENS = {"cpu": 32, "cuda": 64}
KV_TOKENS = 12288  # room for both prompts and all rollouts
TIMELINE = 200  # maximum points
# Peers that answer by default. transformers reads the prompt once per rollout, so it takes longer.
DEFAULT_PEERS = ("llama.cpp",)


def run(device: torch.device, names: Sequence[str] = ()) -> Iterator[dict]:
    """Rows of the question and of the photo, in the forms and peers `names`.

    Raises InputError as `model_peers.select` does, and for peers without one of our forms.
    """
    text_model, image_model = MODELS[device.type]
    config = PRESETS[text_model]
    forms, peers = model_peers.select(names, tuple(FORMS), config, device, DEFAULT_PEERS)
    if not forms:
        raise InputError(
            f"{peers[0].name} generates as many tokens as our rollouts have: add eager or default"
        )
    _photo()  # fails now if a package is missing, not after minutes of the question
    model = Step3VL.from_preset(text_model, device=device, dtype=MAIN_DTYPE[device.type])
    yield from ask(model, forms=forms, peers=model_peers.load(peers, model))
    if image_model != text_model:
        model = Step3VL.from_preset(image_model, device=device, dtype=MAIN_DTYPE[device.type])
    yield from look(model, forms)


def ask(
    model: Step3VL,
    widths: tuple[int, ...] = WIDTHS,
    max_tokens: int | None = None,
    forms: Sequence[str] = tuple(FORMS),
    peers: Mapping[str, LoadedPeer] | None = None,
) -> list[dict]:
    """Rows of a whole PaCoRe answer: all prefills and decode steps of all rounds.

    `tokens_per_second` is generated tokens over the time without loading;
    `decode_tokens_per_second` counts only steps that decode several rollouts. `timeline` is the
    number of running rollouts and the KV in use after each of some steps. Errors are those of the
    rollouts' log-probabilities up to the first token that differs.
    """
    max_tokens = max_tokens or MAX_TOKENS[model.device.type]
    question = [{"role": "user", "content": _question(model)}]
    runs: dict[str, _Run] = {}
    pacores, rollouts, watches = {}, {}, {}
    with progress("question", len(forms) * (sum(widths) + 1) * max_tokens) as advance:
        for name in forms:
            model.set_impl(FORMS[name])
            engine = engine_for(model, kv_tokens=KV_TOKENS, max_running=max(widths))
            pacores[name] = Pacore(model, engine, widths, Sampling(max_tokens))
            watch = watches[name] = _Watch(engine, advance)
            start = time.perf_counter()
            answer = pacores[name].answer(question, on_step=watch)
            runs[name] = _Run(time.perf_counter() - start, watch.ends)
            rollouts[name] = answer.rounds[0].rollouts
    ids = build_prompt(question, model.tokenizer, model.config)
    for name, peer in (peers or {}).items():
        runs[name] = _peer_run(peer, ids, answer)
    case = f"{model.config.name} P{answer.rounds[0].prompt_tokens} W{widths[0]} T{max_tokens}"
    rows = []
    for name, run in runs.items():
        pacore = pacores.get(name, pacores[forms[-1]])  # a peer does the work of our last form
        stats, us = pacore.engine.stats, run.seconds * 1e6
        prefilled = pacore.engine.scheduler.counts.prefilled
        verdict = NOT_RUN
        if name in rollouts and "eager" in rollouts:
            verdict = _same_rollouts(rollouts[name], rollouts["eager"], model.dtype)
        row = measured(
            "pacore",
            case,
            name,
            device=model.device,
            dtype=model.dtype,
            num_bytes=_decode_bytes(pacore),
            flops=2 * _decoder_weights(model) * (prefilled + stats.generated),
            verdict=verdict,
            timing=Timing(us, us, us, 1, "clock"),
        )
        row["tokens_per_second"] = stats.generated / run.seconds
        row["decode_tokens_per_second"] = _rate([end for end in run.ends if end[1] > 1])
        if name in watches:
            row["timeline"] = watches[name].timeline()
        else:
            row |= model_peers.fields(name, run.settings)
        rows.append(row)
    return with_speedups(rows)


class _Run(NamedTuple):
    """A whole answer: its time, each step's end time and number of tokens, a peer's settings."""

    seconds: float
    ends: list[tuple[float, int]]
    settings: str = ""


def _peer_run(peer: LoadedPeer, ids: Sequence[int], answer: Answer) -> _Run:
    """A peer's rounds, as long as those of `answer`, whose first prompt is `ids`."""
    prompts = [list(islice(cycle(ids), round.prompt_tokens)) for round in answer.rounds]
    lengths = [[rollout.num_tokens for rollout in round.rollouts] for round in answer.rounds]
    generate, settings = peer.generator(prompts, lengths, Sampling().temperature)
    ends: list[tuple[float, int]] = []
    start = time.perf_counter()
    for prompt, many in zip(prompts, lengths, strict=True):
        generate(prompt, many, lambda tokens: ends.append((time.perf_counter(), tokens)))
    return _Run(time.perf_counter() - start, ends, settings)


def look(model: Step3VL, forms: Sequence[str] = tuple(FORMS)) -> list[dict]:
    """Rows of one photo with a question, from preprocessed views to the prompt's logits.

    The model's image cache is off: every call encodes the photo.
    """
    assert model.vision is not None
    model.vision.cache.budget = 0
    views = preprocess(_photo(), model.vision.config)
    content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
    messages = [{"role": "user", "content": content}]
    ids = build_prompt(messages, model.tokenizer, model.config, [views])

    def logits(impl: str | None) -> torch.Tensor:
        model.set_impl(impl)
        return model(ids, images=[views])

    impls = {name: FORMS[name] for name in forms}
    expected = logits("eager")
    errors = {name: compare(logits(impl), expected) for name, impl in impls.items()}
    calls = {name: lambda _, impl=impl: logits(impl) for name, impl in impls.items()}
    timings = measure(calls, device=model.device, budget_s=4.0)
    grids = model.vision.grids(views.all)
    rows = []
    for name, error in errors.items():
        row = measured(
            "photo",
            f"{model.config.name} {len(views.crops)} crops, {len(ids)} tokens",
            name,
            device=model.device,
            dtype=model.dtype,
            num_bytes=sum(t.numel() for t in model.parameters()) * model.dtype.itemsize,
            flops=tower_flops(grids, model.config) + 2 * _decoder_weights(model) * len(ids),
            verdict=judged(error, model.dtype),
            timing=timings[name],
        )
        rows.append(row)
    return with_speedups(rows)


class _Watch:
    """Records an engine's progress after each of its steps."""

    def __init__(self, engine: Engine, advance: Callable[[int], None]) -> None:
        self.ends: list[tuple[float, int]] = []  # each step's end time and number of tokens
        self._engine, self._advance, self._start = engine, advance, time.perf_counter()
        self._states: list[tuple[float, int, int]] = []

    def __call__(self, tokens: int) -> None:
        now, scheduler = time.perf_counter(), self._engine.scheduler
        self.ends.append((now, tokens))
        used = self._engine.executor.num_pages - scheduler.tree.free_pages
        state = (len(scheduler.running), used * self._engine.executor.page_size)
        self._states.append((now - self._start, *state))
        self._advance(tokens)

    def timeline(self) -> dict[str, list]:
        """At most TIMELINE of the steps, including the last."""
        every = cdiv(len(self._states), TIMELINE)
        columns = zip(*self._states[::-1][::every][::-1], strict=True)
        return dict(zip(("seconds", "running", "kv_tokens"), map(list, columns), strict=True))


def _rate(ends: list[tuple[float, int]]) -> float | None:
    """Tokens per second between the end of the first step and the end of the last."""
    if len(ends) < 2:
        return None
    return sum(tokens for _, tokens in ends[1:]) / (ends[-1][0] - ends[0][0])


def _question(model: Step3VL) -> str:
    """The licence's text, cut so that the whole prompt has about PROMPT_TOKENS tokens."""
    task = "Say in one sentence what this licence allows.\n\n"
    words = " ".join(LICENCE.read_text().split())
    tokens = model.tokenizer.encode(words)
    return task + model.tokenizer.decode(tokens[: PROMPT_TOKENS - 60])


def _photo():  # noqa: ANN202 -- PIL is an optional dependency
    """A photo of 1280 x 720 pixels."""
    try:
        from PIL import Image
        from skimage import data
    except ImportError:
        raise InputError("the photo needs scikit-image: pip install scikit-image") from None

    return load_image(Image.fromarray(data.astronaut())).resize((1280, 720))


def _decoder_weights(model: Step3VL) -> int:
    """Weights that each token is multiplied with, without the LM head, which few prompt tokens
    reach."""
    layers = model.decoder.layers.parameters()
    return sum(parameter.numel() for parameter in layers)


def _decode_bytes(pacore: Pacore) -> int:
    """Minimum bytes: all weights once per step, and the KV that the decode steps read."""
    model, stats = pacore.model, pacore.engine.stats
    weights = (
        _decoder_weights(model) + model.decoder.lm_head.weight.numel()
    ) * model.dtype.itemsize
    kv = model.config.decoder.kv_bytes_per_token(model.dtype.itemsize)
    return weights * stats.steps + kv * stats.kv_read


def _same_rollouts(
    rollouts: Sequence[RolloutResult], eager: Sequence[RolloutResult], dtype: torch.dtype
) -> Verdict:
    """Compare log-probabilities up to the first differing token; in fp32, 90 % of rollouts must
    agree to the end."""
    pairs: list[tuple[float, float]] = []
    identical = 0
    for a, b in zip(rollouts, eager, strict=True):
        agree = 0
        for x, y in zip(a.tokens, b.tokens, strict=False):
            if x != y:
                break
            agree += 1
        identical += agree == len(a.tokens) == len(b.tokens)
        pairs += zip(a.logprobs[:agree], b.logprobs[:agree], strict=True)
    error = compare(*torch.tensor(pairs or [(0.0, 0.0)]).T)
    failure = None
    wrong = not error.max <= MODEL_TOLERANCE or identical < 0.9 * len(rollouts)
    if dtype == torch.float32 and wrong:
        failure = (
            f"{identical} of {len(rollouts)} rollouts are the same as in eager, at least 90 % must"
            f" be; log-probability error {error.max:.1e}, at most {MODEL_TOLERANCE:.0e} is allowed"
        )
    return Verdict(error.max, error.rms, failure)
