"""End-to-end runs: a PaCoRe question, and a photo up to its first logits; eager and default ops.

On a CPU: SmolLM2 with its real weights and a question about a text of some 1,500 tokens, and a
photo through `tiny`. On a GPU: the 10B with random weights for both. The question is asked once per
form, because it takes a hundred steps and more; the photo is timed like any op.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from bench.decode import FORMS
from bench.numerics import MODEL_TOLERANCE, Verdict, compare, judged
from bench.ops import MAIN_DTYPE
from bench.rows import LICENCE, measured, with_speedups
from bench.timing import Timing, measure
from bench.vision import tower_flops
from kernels.runtime.arithmetic import cdiv
from model.errors import InputError
from model.step3vl import Step3VL
from model.terminal import progress
from model.text.prompt import build_prompt
from model.vision.image import load_image, preprocess
from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.pacore import Pacore, engine_for
from pacore_sched.engine.engine import Engine
from pacore_sched.sched.request import Sampling

MODELS = {"cpu": ("smollm2-135m", "tiny"), "cuda": ("step3-vl-10b", "step3-vl-10b")}
WIDTHS, PROMPT_TOKENS = (16,), 1500
MAX_TOKENS = {"cpu": 32, "cuda": 64}
KV_TOKENS = 12288  # room for both prompts and all rollouts
TIMELINE = 200  # maximum points


def run(device: torch.device) -> Iterator[dict]:
    """Rows of the question and of the photo."""
    _photo()  # fails now if a package is missing, not after minutes of the question
    text_model, image_model = MODELS[device.type]
    model = Step3VL.from_preset(text_model, device=device, dtype=MAIN_DTYPE[device.type])
    yield from ask(model)
    if image_model != text_model:
        model = Step3VL.from_preset(image_model, device=device, dtype=MAIN_DTYPE[device.type])
    yield from look(model)


def ask(
    model: Step3VL, widths: tuple[int, ...] = WIDTHS, max_tokens: int | None = None
) -> list[dict]:
    """Rows of a whole PaCoRe answer: all prefills and decode steps of all rounds.

    `tokens_per_second` is generated tokens over the time without loading;
    `decode_tokens_per_second` counts only steps that decode several rollouts. `timeline` is the
    number of running rollouts and the KV in use after each of some steps. Errors are those of the
    rollouts' log-probabilities up to the first token that differs.
    """
    max_tokens = max_tokens or MAX_TOKENS[model.device.type]
    question = [{"role": "user", "content": _question(model)}]
    seconds, decoding, pacores, rollouts, watches = {}, {}, {}, {}, {}
    with progress("question", len(FORMS) * (sum(widths) + 1) * max_tokens) as advance:
        for name, impl in FORMS.items():
            model.set_impl(impl)
            engine = engine_for(model, kv_tokens=KV_TOKENS, max_running=max(widths))
            pacores[name] = Pacore(model, engine, widths, Sampling(max_tokens))
            watch = watches[name] = _Watch(engine, advance)
            start = time.perf_counter()
            answer = pacores[name].answer(question, on_step=watch)
            seconds[name] = time.perf_counter() - start
            decoding[name] = _rate([end for end in watch.ends if end[1] > 1])
            rollouts[name] = answer.rounds[0].rollouts
    rows = []
    for name, pacore in pacores.items():
        stats, us = pacore.engine.stats, seconds[name] * 1e6
        prefilled = pacore.engine.scheduler.counts.prefilled
        row = measured(
            "pacore",
            f"{model.config.name} P{answer.rounds[0].prompt_tokens} W{widths[0]} T{max_tokens}",
            name,
            device=model.device,
            dtype=model.dtype,
            num_bytes=_decode_bytes(pacore),
            flops=2 * _decoder_weights(model) * (prefilled + stats.generated),
            verdict=_same_rollouts(rollouts[name], rollouts["eager"], model.dtype),
            timing=Timing(us, us, us, 1, "clock"),
        )
        rates = {
            "tokens_per_second": stats.generated / seconds[name],
            "decode_tokens_per_second": decoding[name],
        }
        rows.append(row | rates | {"timeline": watches[name].timeline()})
    return with_speedups(rows)


def look(model: Step3VL) -> list[dict]:
    """Rows of one photo with a question, from preprocessed views to the prompt's logits.

    The model's image cache is off: every call encodes the photo.
    """
    model.vision.cache.budget = 0
    views = preprocess(_photo(), model.config.vision)
    content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
    messages = [{"role": "user", "content": content}]
    ids = build_prompt(messages, model.tokenizer, model.config, [views])

    def logits(impl: str | None) -> torch.Tensor:
        model.set_impl(impl)
        return model(ids, images=[views])

    expected = logits("eager")
    errors = {name: compare(logits(impl), expected) for name, impl in FORMS.items()}
    timings = measure(
        {name: lambda _, impl=impl: logits(impl) for name, impl in FORMS.items()},
        device=model.device,
        budget_s=4.0,
    )
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
    weights = (_decoder_weights(model) + model.decoder.lm_head.numel()) * model.dtype.itemsize
    kv = model.config.decoder.kv_bytes_per_token(model.dtype.itemsize)
    return weights * stats.steps + kv * stats.kv_read


def _same_rollouts(
    rollouts: Sequence[RolloutResult], eager: Sequence[RolloutResult], dtype: torch.dtype
) -> Verdict:
    """Compare log-probabilities up to the first differing token; in fp32, 90 % of rollouts must
    agree to the end."""
    pairs, identical = [], 0
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
