"""`python -m pacore_sched ask QUESTION`: answer one question with PaCoRe."""

import argparse
import json
import sys
import time
from contextlib import closing
from functools import partial

from model.errors import InputError
from model.terminal import progress
from model.vision.image import load_image, preprocess
from pacore_sched.answers.image_loader import ImageLoader
from pacore_sched.answers.images import vision_of
from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.live import Answer
from pacore_sched.answers.pacore import Pacore
from pacore_sched.answers.rounds import compact, load_template, parse_widths, round_widths
from pacore_sched.cli import options as shared
from pacore_sched.engine.stopping import checked_stops


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question")
    parser.add_argument("--image", action="append", default=[], help="image file; may be repeated")
    shared.add_pacore_options(parser)
    shared.add_sampling_options(parser)
    shared.add_model_options(parser)
    shared.add_engine_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document, nothing else")


def run(options: argparse.Namespace) -> int:
    """The `ask` command; returns 1 if there is no answer. Raises InputError for invalid options."""
    widths = parse_widths(options.widths)
    template = load_template(options.template) if options.template else None
    checked_stops(options.stop)
    if not options.question.strip():
        raise InputError("the question is empty")
    with closing(ImageLoader()) as loader:
        images = loader.load(partial(load_image, path) for path in options.image)
        model = shared.load_model(options)
        sampling = shared.sampling_for(options, model.config.sampling)
        views = loader.load(partial(preprocess, image, vision_of(model)) for image in images)
    content = [{"type": "image"} for _ in views] + [{"type": "text", "text": options.question}]
    engine = shared.make_engine(options, model, problems=1, width=max(round_widths(widths)))
    pacore = Pacore(model, engine, widths, sampling, seed=options.seed, template=template)

    def show(result: RolloutResult) -> None:
        if not options.json:
            print_rollout(result, last=result.round == len(widths))

    start = time.perf_counter()
    total = sum(round_widths(widths)) * sampling.max_tokens
    with progress("rollouts", total) as advance:
        answer = pacore.answer(
            [{"role": "user", "content": content}], views, on_rollout=show, on_step=advance
        )
    seconds = time.perf_counter() - start
    if options.json:
        print(json.dumps(report(pacore, answer, seconds)))
    else:
        print_answer(pacore, answer, seconds)
    if answer.error:
        print(f"failed: {answer.error}", file=sys.stderr)
    return int(answer.error is not None)


def report(pacore: Pacore, answer: Answer, seconds: float) -> dict:
    """The JSON document that `ask --json` prints."""
    stats = pacore.engine.stats
    return {
        "answer": answer.text,
        "error": answer.error,
        "rounds": [round_.record() for round_ in answer.rounds],
        "seconds": seconds,
        "tokens_per_second": stats.generated / seconds,
        "prefix_tokens_saved": pacore.prefix_tokens_saved,
        "kv_tokens_read": stats.kv_read,
        "kv_tokens_read_unshared": stats.kv_read_unshared,
    }


def print_rollout(result: RolloutResult, *, last: bool) -> None:
    """Print one rollout, and its message if that is not the whole text."""
    name = "synthesis" if last else f"round {result.round + 1}, rollout {result.index + 1}"
    print(f"--- {name}: {result.num_tokens} tokens, {result.finish_reason}", flush=True)
    print(result.text.strip(), flush=True)
    if (message := compact(result.text)) != result.text and not last:
        print(f"    message: {message.strip()}", flush=True)


def print_answer(pacore: Pacore, answer: Answer, seconds: float) -> None:
    """Print the answer, the speed, and what sharing the prompts saved."""
    stats = pacore.engine.stats
    rollouts = sum(len(round_.rollouts) for round_ in answer.rounds)
    for number, round_ in enumerate(answer.rounds, start=1):
        changes = ((round_.cut, "without their beginnings"), (round_.dropped, "left out"))
        texts = [
            f"{', '.join(str(index + 1) for index in indices)} {what}"
            for indices, what in changes
            if indices
        ]
        if texts:
            print(f"--- round {number}'s prompt, to fit: messages {'; '.join(texts)}")
    print(f"=== answer\n{answer.text.strip()}")
    print(
        f"=== {rollouts} rollouts, {stats.generated} tokens in {seconds:.1f} s"
        f" ({stats.generated / seconds:.1f} tokens/s)"
    )
    print(
        f"    shared prompts: {pacore.prefix_tokens_saved} tokens not prefilled again;"
        f" decode steps read the KV of {stats.kv_read} tokens instead of {stats.kv_read_unshared}"
    )
