"""`python -m bench needle`: facts that SmolLM2 finds in long texts, by depth, length and scaling.

Contexts beyond the trained 8,192 tokens are read as they are (`none`), by position interpolation
(`linear`) and by YaRN, with its attention temperature and without.
"""

import argparse
from collections.abc import Iterator

import torch

from bench.cli.measurement import Measurement
from bench.needle import study
from bench.rows import show
from bench.rows.run_tables import NEEDLE_DEPTHS
from model.terminal import integer

LENGTHS, HAYSTACKS = (2048, 8192, 16384), 2


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--tokens",
        nargs="+",
        type=integer(512, 2**20),
        default=LENGTHS,
        metavar="N",
        help=f"of a text with a question and its answer (default: {' '.join(map(str, LENGTHS))})",
    )
    add("--forms", nargs="+", choices=study.FORMS, default=tuple(study.FORMS), help="default: all")
    add(
        "--haystacks",
        type=integer(1, 1000),
        default=HAYSTACKS,
        metavar="N",
        help=f"texts for each length, {len(NEEDLE_DEPTHS)} needles each (default: {HAYSTACKS})",
    )


def rows(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """The rows of every length and form."""
    yield from study.run(device, options.tokens, options.forms, options.haystacks)


NEEDLE = Measurement(rows, show.needle, arguments)
