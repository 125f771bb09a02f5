"""`python -m pacore_sched ask QUESTION`: one question, answered by PaCoRe."""

import argparse
import json
import time
from pathlib import Path

import torch

from kernels._launch import IMPLS
from model.image import load_image, preprocess
from model.impls import DTYPES
from model.step3vl import Step3VL
from model.terminal import InputError, Parser, progress, run_command
from pacore_sched.engine import Rollout, Sampling
from pacore_sched.pacore import Answer, Pacore
from pacore_sched.rounds import compact, load_template, parse_widths, round_widths


def main() -> int:
    """Run the command; its exit code."""
    parser = Parser(prog="python -m pacore_sched", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    ask = commands.add_parser(
        "ask",
        help="answer one question",
        description="Answer one question: parallel rollouts, their messages, and a synthesis.",
    )
    ask.add_argument("question")
    ask.add_argument("--model", default="smollm2-135m", help="preset, checkpoint folder or GGUF")
    ask.add_argument("--image", action="append", default=[], help="image file; may be repeated")
    ask.add_argument("--widths", default="16", help="rollouts per round, e.g. 16 or 32,4; '' is 1")
    ask.add_argument("--max-tokens", type=int, default=512, help="per rollout")
    ask.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    ask.add_argument("--top-k", type=int, default=0, help="0 keeps all tokens")
    ask.add_argument("--top-p", type=float, default=1.0)
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--template", help="jinja2 file for the synthesis prompt")
    ask.add_argument("--impl", help=f"how ops run: {', '.join(IMPLS)}; default: the best here")
    ask.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ask.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, else bfloat16")
    ask.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    return run_ask(parser.parse_args())


def run_ask(options: argparse.Namespace) -> int:
    """The `ask` command; 1 if it found no answer. Raises InputError for what is wrong with it."""
    widths = parse_widths(options.widths)
    template = load_template(options.template) if options.template else None
    sampling = checked_sampling(options)
    if not options.question.strip():
        raise InputError("the question is empty")
    photos = [load_image(path) for path in options.image]
    model = load_model(options)
    if photos and model.config.vision is None:
        raise InputError(f"model {model.config.name} has no vision tower: it takes no images")
    views = [preprocess(photo, model.config.vision) for photo in photos]
    content = [{"type": "image"} for _ in views] + [{"type": "text", "text": options.question}]
    pacore = Pacore(model, widths, sampling, seed=options.seed, template=template)

    def show(number: int, rollout: Rollout, text: str) -> None:
        if not options.json:
            print_rollout(number, rollout, text, last=number == len(widths))

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
    return int(answer.failed)


def load_model(options: argparse.Namespace) -> Step3VL:
    """The model that --model, --device, --dtype and --impl name."""
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"device {options.device!r} cannot be used on this machine") from None
    default = torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = DTYPES[options.dtype] if options.dtype else default
    exists = Path(options.model).exists()
    load = Step3VL.from_pretrained if exists else Step3VL.from_preset
    return load(options.model, device=device, dtype=dtype, impl=options.impl)


def checked_sampling(options: argparse.Namespace) -> Sampling:
    """Sampling options within their ranges. Raises InputError naming the one that is not."""
    for ok, message in (
        (options.max_tokens >= 1, "--max-tokens must be at least 1"),
        (
            options.temperature == 0 or 1e-6 <= options.temperature <= 1e6,
            "--temperature must be 0, or from 1e-6 to 1e6",
        ),
        (options.top_k >= 0, "--top-k must be 0 or more"),
        (0 < options.top_p <= 1, "--top-p must be above 0 and at most 1"),
    ):
        if not ok:
            raise InputError(message)
    return Sampling(options.max_tokens, options.temperature, options.top_k, options.top_p)


def report(pacore: Pacore, answer: Answer, seconds: float) -> dict:
    """The JSON document of `ask`."""
    stats = pacore.engine.stats
    return {
        "answer": answer.text,
        "rounds": [
            {
                "prompt_tokens": round_.prompt_tokens,
                "rollouts": [
                    {
                        "text": text,
                        "tokens": len(rollout.tokens),
                        "seed": rollout.seed,
                        "finish_reason": rollout.finish_reason,
                    }
                    for rollout, text in zip(round_.rollouts, round_.texts, strict=True)
                ],
            }
            for round_ in answer.rounds
        ],
        "seconds": seconds,
        "tokens_per_second": stats.generated / seconds,
        "prefix_tokens_saved": answer.prefix_tokens_saved,
        "kv_tokens_read": stats.kv_read,
        "kv_tokens_read_unshared": stats.kv_read_unshared,
    }


def print_rollout(number: int, rollout: Rollout, text: str, *, last: bool) -> None:
    """One rollout, with the message that it passes on if that is not the whole text."""
    name = "synthesis" if last else f"round {number + 1}, rollout {rollout.index + 1}"
    print(f"--- {name}: {len(rollout.tokens)} tokens, {rollout.finish_reason}", flush=True)
    print(text.strip(), flush=True)
    if (message := compact(text)) != text and not last:
        print(f"    message: {message.strip()}", flush=True)


def print_answer(pacore: Pacore, answer: Answer, seconds: float) -> None:
    stats = pacore.engine.stats
    print(f"=== answer\n{answer.text.strip()}")
    print(
        f"=== {stats.generated} tokens in {seconds:.1f} s:"
        f" {stats.generated / seconds:.1f} tokens/s;"
        f" {answer.prefix_tokens_saved} prompt tokens shared instead of prefilled again;"
        f" decode read the KV of {stats.kv_read} tokens instead of {stats.kv_read_unshared}"
    )


if __name__ == "__main__":
    run_command(main)
