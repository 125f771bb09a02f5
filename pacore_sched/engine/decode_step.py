"""A decode step on the device: every running rollout's last token in, its next one out.

Nothing comes from the host: the step reads the tokens that the one before it drew, moves its plan
one token on, and leaves its own tokens where the next step reads them and in a table with an entry
per rollout, from which whatever runs next starts. So it can be run again and again as it is, and
captured in a CUDA graph. It launches nothing but the model's ops, `advance` and `sample`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kernels.runtime.staging import Packed
from kernels.sampling import SampleOutput, sample
from model.decoder import Step
from model.kv_cache import KVCache
from model.step3vl import Step3VL
from pacore_sched.sched.request import Rollout, Sampling

SamplingKey = tuple[float, int, float]  # temperature, top_k, top_p


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


def sampling_key(sampling: Sampling) -> SamplingKey:
    return sampling.temperature, sampling.top_k, sampling.top_p


class LastTokens:
    """The last token of each batch index, int64 on the device, and one entry for padding rows."""

    def __init__(self, max_running: int, device: torch.device) -> None:
        self.padding_index = max_running
        self.last = torch.zeros(max_running + 1, dtype=torch.int64, device=device)
        self._owner: list[int | None] = [None] * max_running  # node ids, never reused

    def claim(self, rollouts: Sequence[tuple[Rollout, int | None]]) -> None:
        """Write the last tokens of rollouts that have just taken over a batch index.

        Each comes with its last token, None if the host does not know it yet. Raises ValueError
        if an unknown one is needed.
        """
        new = [(r, last) for r, last in rollouts if self._owner[r.batch_index] != r.node]
        unknown = next((rollout for rollout, last in new if last is None), None)
        if unknown is not None:
            raise ValueError(f"the last token of {unknown} is neither known nor in the table")
        if not new:
            return
        packed = Packed(
            dict.fromkeys(("index", "last"), (len(new),)),
            dtype=torch.int64,
            device=self.last.device,
        )
        index, last = [r.batch_index for r, _ in new], [last for _, last in new]
        packed.fill({"index": np.array(index), "last": np.array(last)})
        self.last.index_copy_(0, packed.tensors["index"], packed.tensors["last"])
        for rollout, _ in new:
            self._owner[rollout.batch_index] = rollout.node

    def forget(self, rollout: Rollout) -> None:
        """The next `claim` writes this rollout's last token again."""
        self._owner[rollout.batch_index] = None


@dataclass(frozen=True)
class RowSampler:
    """How tokens are drawn from rows of logits: the same for all of them, or in parts."""

    parts: tuple[tuple[SamplingKey, Tensor | None], ...]  # None for all rows

    @staticmethod
    def of(settings: Sequence[SamplingKey], device: torch.device) -> "RowSampler":
        """`settings` of each row."""
        rows: dict[SamplingKey, list[int]] = {}
        for row, own in enumerate(settings):
            rows.setdefault(own, []).append(row)
        if len(rows) == 1:
            return RowSampler(((settings[0], None),))
        packed = Packed(
            {str(own): (len(of),) for own, of in rows.items()}, dtype=torch.int64, device=device
        )
        packed.fill({str(own): np.array(of) for own, of in rows.items()})
        return RowSampler(tuple((own, packed.tensors[str(own)]) for own in rows))

    def draw(
        self, model: Step3VL, hidden: Tensor, seeds: Tensor, positions: Tensor, **feeds: Tensor
    ) -> Tensor:
        """Draw the tokens that follow final hidden states [B, hidden]: `SampleOutput.results`.

        positions: [B] of the tokens to be drawn
        feeds: where else they are written, as fields of `SampleOutput`
        """
        logits, impl = model.decoder.logits(hidden), model.impl["sample"]
        out = SampleOutput.of(len(seeds), seeds.device, **feeds)
        tokens = torch.empty_like(seeds)
        logprobs = torch.empty_like(seeds, dtype=torch.float32)
        for (temperature, top_k, top_p), rows in self.parts:
            draw = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, impl=impl)
            if rows is None:
                draw(logits, seeds, positions, out=out)
                return out.results
            drawn = draw(logits[rows], seeds[rows], positions[rows])
            tokens[rows], logprobs[rows] = drawn[0].long(), drawn[1]
        out.write(tokens, logprobs)
        return out.results


@dataclass(frozen=True)
class DecodeStep:
    """StepRows in the plan's order. Tensors are int64 [T]."""

    step: Step
    batch_indices: Tensor  # of each row, in LastTokens
    seeds: Tensor
    ids: Tensor  # each row's last token; `run` leaves those of the next step here
    drawing: RowSampler
    advances: bool  # whether the plan can be moved on, on the device

    def run(self, model: Step3VL, cache: KVCache, tables: LastTokens) -> Tensor:
        """One step's results, int32 [2, T], as `unpacked_results` reads them."""
        hidden = model.decoder(model.decoder.embed(self.ids), self.step, cache)
        # A plan that has moved on says where the tokens to be drawn will stand.
        if self.advances:
            self.step.advance()
        positions = self.step.positions if self.advances else self.step.positions + 1
        feeds = {"ids": self.ids, "last": tables.last, "batch_indices": self.batch_indices}
        return self.drawing.draw(model, hidden, self.seeds, positions, **feeds)


def unpacked_results(results: Tensor) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities as lists, of `SampleOutput.results` on the host."""
    return results[0].tolist(), results[1].view(torch.float32).tolist()
