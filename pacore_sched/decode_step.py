"""A decode step on the device: every running rollout's last token in, its next one out.

Nothing comes from the host: last tokens and seeds stand in tables, one entry per rollout, and the
step ends by writing its tokens there and moving its plan one token on. So it can be run again and
again as it is, and captured in a CUDA graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels._packed import Packed
from kernels.sampling import sample
from model.decoder import Step
from model.kv_cache import KVCache
from model.step3vl import Step3VL
from pacore_sched.request import Rollout, Sampling

Settings = tuple[float, int, float]  # temperature, top_k, top_p


def advances(model: Step3VL) -> bool:
    """Whether attention reads its plan on the device alone, where it can be moved on."""
    return _in_triton(model, "prefix_attention")


def capturable(model: Step3VL) -> bool:
    """Whether a decode step in the model's forms can be a CUDA graph: the plan advances on the
    device, and tokens are drawn without waiting for it, as PyTorch's top-p does."""
    return model.device.type == "cuda" and advances(model) and _in_triton(model, "sample")


def _in_triton(model: Step3VL, op: str) -> bool:
    impl = model.impl[op]
    return impl == "triton" or (impl is None and model.device.type == "cuda")


def settings_of(sampling: Sampling) -> Settings:
    return sampling.temperature, sampling.top_k, sampling.top_p


class Tables:
    """Last token and seed of each slot, int64 on the device; one more entry, for rows that pad."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.nobody = slots
        self.last = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self.seeds = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self._owner: list[int | None] = [None] * slots  # nodes: none is ever named like another

    def claim(self, rollouts: Sequence[tuple[Rollout, int | None]]) -> None:
        """Enter the rollouts whose slots hold something else, by their last tokens as the host
        knows them; None where it does not. Raises ValueError if that is needed."""
        new = [(r, last) for r, last in rollouts if self._owner[r.slot] != r.node]
        unknown = next((rollout for rollout, last in new if last is None), None)
        if unknown is not None:
            raise ValueError(f"the last token of {unknown} is neither known nor in the table")
        if not new:
            return
        packed = Packed(
            dict.fromkeys(("slots", "seeds", "last"), (len(new),)),
            dtype=torch.int64,
            device=self.last.device,
        )
        slots, seeds = [r.slot for r, _ in new], [r.seed for r, _ in new]
        last = [last for _, last in new]
        packed.fill({"slots": np.array(slots), "seeds": np.array(seeds), "last": np.array(last)})
        entries = packed.tensors
        self.last.index_copy_(0, entries["slots"], entries["last"])
        self.seeds.index_copy_(0, entries["slots"], entries["seeds"])
        for rollout, _ in new:
            self._owner[rollout.slot] = rollout.node

    def forget(self, rollout: Rollout) -> None:
        """Let the host say, the next time, which of its tokens is the last."""
        self._owner[rollout.slot] = None


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn from rows of logits: the same for all of them, or in parts."""

    parts: tuple[tuple[Settings, Tensor | None], ...]  # None for all rows

    @staticmethod
    def of(settings: Sequence[Settings], device: torch.device) -> "Drawing":
        """`settings` of each row."""
        rows: dict[Settings, list[int]] = {}
        for row, own in enumerate(settings):
            rows.setdefault(own, []).append(row)
        if len(rows) == 1:
            return Drawing(((settings[0], None),))
        packed = Packed(
            {str(own): (len(of),) for own, of in rows.items()}, dtype=torch.int64, device=device
        )
        packed.fill({str(own): np.array(of) for own, of in rows.items()})
        return Drawing(tuple((own, packed.tensors[str(own)]) for own in rows))

    def draw(
        self, model: Step3VL, hidden: Tensor, seeds: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens int64 [B] and log-probabilities fp32 [B] behind final hidden states [B, hidden].

        positions: [B] of the tokens to be drawn
        """
        logits, impl = model.decoder.logits(hidden), model.impl["sample"]
        tokens = torch.empty_like(seeds)
        logprobs = torch.empty_like(seeds, dtype=torch.float32)
        for (temperature, top_k, top_p), rows in self.parts:
            options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "impl": impl}
            if rows is None:
                return sample(logits, seeds, positions, **options)
            drawn = sample(logits[rows], seeds[rows], positions[rows], **options)
            tokens[rows], logprobs[rows] = drawn
        return tokens, logprobs


@dataclass(frozen=True)
class DecodeStep:
    """Rows in the plan's order; `owners` int64 [T] are their slots in the tables."""

    step: Step
    owners: Tensor
    drawing: Drawing
    advances: bool  # whether the plan can be moved on, on the device

    def run(self, model: Step3VL, cache: KVCache, tables: Tables) -> Tensor:
        """One step; what `packed_results` makes of it."""
        embeddings = model.decoder.embed(tables.last[self.owners])
        hidden = model.decoder(embeddings, self.step, cache)
        positions = self.step.positions + 1
        drawn = self.drawing.draw(model, hidden, tables.seeds[self.owners], positions)
        # A token of -1 ends its rollout, whose next row, if there is one, counts for nothing.
        tables.last.index_copy_(0, self.owners, drawn[0].clamp_min(0))
        if self.advances:
            self.step.advance()
        return packed_results(*drawn)


def packed_results(tokens: Tensor, logprobs: Tensor) -> Tensor:
    """Tokens and the bits of log-probabilities, int32 [2, B], to be copied at once."""
    return torch.stack([tokens.int(), logprobs.view(torch.int32)])


def unpacked_results(results: Tensor) -> tuple[list[int], list[float]]:
    """Both as lists."""
    return results[0].tolist(), results[1].view(torch.float32).tolist()
