"""A model peer: another program that runs the whole decoder, from token ids to logits or tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bench.peers.peer import Library, Unavailable
from model.config import Config
from model.step3vl import Step3VL

OnStep = Callable[[int], None]  # called after every step, with its number of tokens


@dataclass(frozen=True)
class Work:
    """What a peer is timed at: `call` does it once more, and returns fp32 logits [rows, vocab].

    settings: how the peer ran, for the row
    """

    call: Callable[[], Tensor]
    settings: str


class Generate(Protocol):
    """Samples one continuation of `prompt` for each of `lengths`, which is its number of tokens."""

    def __call__(self, prompt: Sequence[int], lengths: Sequence[int], on_step: OnStep) -> None: ...


def on_cpu(device: torch.device) -> None:
    """Raises Unavailable for other devices than a CPU."""
    if device.type != "cpu":
        raise Unavailable("only measured on a CPU")


class LoadedPeer(Protocol):
    """A peer with a model's weights. Its methods raise Unavailable for work that it cannot do."""

    def decode_step(self, prompt: Tensor, suffixes: Tensor) -> Work:
        """The step that reads the last of suffixes, int [B, S], each after prompt, int [P], and
        after the tokens before it. Every call is the same step."""

    def prefill(self, prompt: Tensor) -> Work:
        """Reading a whole prompt, int [N], up to the logits of its last token, [1, vocab]."""

    def generator(
        self, prompts: Sequence[Sequence[int]], lengths: Sequence[Sequence[int]], temperature: float
    ) -> tuple[Generate, str]:
        """A function that generates for one prompt and its lengths after the other, and its
        settings."""


@dataclass(frozen=True)
class ModelPeer:
    """A program to compare whole steps and answers with, on a CPU.

    check: raises Unavailable for a model that it cannot run
    load: the peer with this model's weights
    """

    name: str
    library: Library
    check: Callable[[Config], object]
    load: Callable[[Step3VL], LoadedPeer]

    def absence(self, config: Config, device: torch.device) -> str | None:
        """Why it cannot be used on `device` with a model; None if it can."""
        try:
            self.library.check(device)
            self.check(config)
        except Unavailable as reason:
            return str(reason)
        return None
