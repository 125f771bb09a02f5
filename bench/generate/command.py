"""`python -m bench generate`: many continuations of a prompt in transformers, by its own `generate`
and by ours, which reads and stores the prompt once, with the model's own layers and with ours.

All run the same model, alternately, with the same random numbers. Every continuation has
`--new-tokens` tokens.
"""

import argparse
from collections.abc import Iterator

import torch

from bench.cli.measurement import Measurement
from bench.generate import study
from bench.rows import show
from model.config import PRESETS
from model.terminal import integer
from pacore_sched.answers.rounds import MAX_WIDTH


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="PRESET",
        default="smollm2-135m",
        help=f"one of {', '.join(PRESETS)} (default: smollm2-135m)",
    )
    parser.add_argument(
        "--prompt",
        nargs="+",
        type=integer(1, 10**6),
        default=(512, 2048),
        metavar="N",
        help="prompts of N random tokens (default: 512 2048)",
    )
    for name, largest, default, what in (
        ("sequences", MAX_WIDTH, 16, "continuations of a prompt"),
        ("new-tokens", 10**6, 32, "tokens of each continuation"),
        ("repeats", 1000, 3, "timed runs of each form"),
    ):
        parser.add_argument(
            f"--{name}",
            type=integer(1, largest),
            default=default,
            metavar="N",
            help=f"{what} (default: {default})",
        )


def rows(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """A row for each prompt and form."""
    cases = [study.GenerateCase(n, options.sequences, options.new_tokens) for n in options.prompt]
    yield from study.run(options.model, device, cases, options.repeats)


GENERATE = Measurement(rows, show.generate, arguments)
