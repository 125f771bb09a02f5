"""A decode step on the device: each running rollout's last token in, its next one out.

Needs nothing from the host: the step reads the tokens that the previous one sampled, advances its
plan by one token, and writes its tokens to where the next step reads them, and to a table with an
entry per rollout, from which any other kind of step starts. It can therefore run repeatedly without
changes, and be captured in a CUDA graph. It launches only the model's ops, `advance` and `sample`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.runtime.staging import Packed
from kernels.sampling import SampleOutput, sample
from model.decoder import Step
from model.kv_cache import KVCache
from model.step3vl import Step3VL
from pacore_sched.engine.logprobs import TopRows
from pacore_sched.sched.request import Rollout, Sampling


class SamplingKey(NamedTuple):
    """The sampling parameters that a launch depends on: rows with equal keys share launches."""

    temperature: float
    top_k: int
    top_p: float
    logprobs: str = "raw"


def advances(model: Step3VL) -> bool:
    """Whether attention follows a plan that advances on the device: all forms but the definition,
    which reads the plan's nodes on the host."""
    return model.impl["prefix_attention"] != "eager"


def capturable(model: Step3VL) -> bool:
    """Whether a decode step of this model can be a CUDA graph: the plan advances on the device, and
    sampling does not wait for the device, as PyTorch's top-p does."""
    triton = (_in_triton(model, op) for op in ("prefix_attention", "sample"))
    return model.device.type == "cuda" and all(triton)


def _in_triton(model: Step3VL, op: str) -> bool:
    impl = model.impl[op]
    return impl == "triton" or (impl is None and model.device.type == "cuda")


def sampling_key(sampling: Sampling) -> SamplingKey:
    return SamplingKey(sampling.temperature, sampling.top_k, sampling.top_p, sampling.logprobs)


class LastTokens:
    """The last token of each batch index, int64 on the device; one more entry for padding rows."""

    def __init__(self, max_running: int, device: torch.device) -> None:
        self.padding_index = max_running
        self.tokens = torch.zeros(max_running + 1, dtype=torch.int64, device=device)
        self._owner: list[int | None] = [None] * max_running  # nodes, whose ids are never reused

    def claim(self, rollouts: Sequence[tuple[Rollout, int | None]]) -> None:
        """Write the last tokens of rollouts that have just received their batch index.

        Each comes with its last token, or None if the host does not know it yet. Raises ValueError
        if an unknown one is needed.
        """
        new = [(r, last) for r, last in rollouts if self._owner[r.batch_index] != r.node]
        unknown = next((rollout for rollout, last in new if last is None), None)
        if unknown is not None:
            raise ValueError(f"the last token of {unknown} is neither known nor on the device")
        if not new:
            return
        packed = Packed(
            dict.fromkeys(("index", "last"), (len(new),)),
            dtype=torch.int64,
            device=self.tokens.device,
        )
        index, last = [r.batch_index for r, _ in new], [last for _, last in new]
        packed.fill({"index": np.array(index), "last": np.array(last)})
        self.tokens.index_copy_(0, packed.tensors["index"], packed.tensors["last"])
        for rollout, _ in new:
            self._owner[rollout.batch_index] = rollout.node

    def clear(self) -> None:
        """Make the next `claim` write the last tokens of all rollouts."""
        self._owner = [None] * self.padding_index

    def forget(self, rollout: Rollout) -> None:
        """Make the next `claim` write this rollout's last token again."""
        self._owner[rollout.batch_index] = None


@dataclass(frozen=True)
class RowSampler:
    """How to sample from rows of logits: with the same parameters for all rows, or in parts."""

    parts: tuple[tuple[SamplingKey, Tensor | None], ...]  # with their rows; None for all
    top: TopRows | None = None  # those that come with alternatives

    @staticmethod
    def of(samplings: Sequence[Sampling], device: torch.device) -> "RowSampler":
        """A sampler for rows with these parameters."""
        top = TopRows.of(samplings, device)
        rows: dict[SamplingKey, list[int]] = {}
        for row, sampling in enumerate(samplings):
            rows.setdefault(sampling_key(sampling), []).append(row)
        if len(rows) == 1:
            return RowSampler(((sampling_key(samplings[0]), None),), top)
        packed = Packed(
            {str(key): (len(indices),) for key, indices in rows.items()},
            dtype=torch.int64,
            device=device,
        )
        packed.fill({str(key): np.array(indices) for key, indices in rows.items()})
        return RowSampler(tuple((key, packed.tensors[str(key)]) for key in rows), top)

    def sample(
        self, model: Step3VL, hidden: Tensor, seeds: Tensor, positions: Tensor, **feeds: Tensor
    ) -> Tensor:
        """Sample the tokens that follow final hidden states [B, hidden]; results as in logprobs.py.

        positions: [B] of the tokens to be sampled
        feeds: other tensors to write them to, as fields of `SampleOutput`
        """
        logits, out = (
            model.decoder.logits(hidden),
            SampleOutput.of(len(seeds), seeds.device, **feeds),
        )
        self._sample(logits, seeds, positions, model.impl["sample"], out)
        return self.top.append(out.results, logits) if self.top else out.results

    def _sample(
        self,
        logits: Tensor,
        seeds: Tensor,
        positions: Tensor,
        impl: str | None,
        out: SampleOutput,
    ) -> None:
        tokens = torch.empty_like(seeds)
        logprobs = torch.empty_like(seeds, dtype=torch.float32)
        for key, rows in self.parts:
            parameters = key._asdict()
            if rows is None:
                sample(logits, seeds, positions, **parameters, impl=impl, out=out)
                return
            results = sample(logits[rows], seeds[rows], positions[rows], **parameters, impl=impl)
            tokens[rows], logprobs[rows] = results[0].long(), results[1]
        out.write(tokens, logprobs)


@dataclass(frozen=True)
class DecodeStep:
    """A decode step; rows in the plan's order. Tensors are int64 [T]."""

    step: Step
    batch_indices: Tensor  # each row's entry in LastTokens
    seeds: Tensor
    ids: Tensor  # each row's last token; `run` replaces them with the next step's
    sampler: RowSampler
    advances: bool  # whether the plan can advance on the device

    def run(self, model: Step3VL, cache: KVCache, last_tokens: LastTokens) -> Tensor:
        """Run one step; its results are those of T rows, as in logprobs.py."""
        hidden = model.decoder(model.decoder.embed(self.ids), self.step, cache)
        # An advanced plan has the positions of the tokens to be sampled.
        if self.advances:
            self.step.advance()
        positions = self.step.positions if self.advances else self.step.positions + 1
        feeds = {"ids": self.ids, "last": last_tokens.tokens, "batch_indices": self.batch_indices}
        return self.sampler.sample(model, hidden, self.seeds, positions, **feeds)
