"""The sampling op: one token per row of logits, by temperature, top-k, top-p, then Gumbel-max.

The noise is counter-based (Philox4x32-10), without generator state, so a row's token depends only
on its logits, seed and position, not on the rest of the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.runtime.arithmetic import cdiv
from kernels.runtime.configs import Gpu, KernelConfig, Tunable
from kernels.runtime.dispatch import check, operators, pick
from kernels.runtime.dtypes import DTYPES, dtype_name
from kernels.sampling.kernel import (
    GROUP,
    sample_cut_kernel,
    sample_draw_kernel,
    sample_pick_kernel,
    sample_scan_kernel,
)
from kernels.sampling.portable import sample_portable
from kernels.sampling.reference import sample_ref

LOGPROBS = ("raw", "processed")


@dataclass(frozen=True)
class SampleOutput:
    """Where `sample` writes the B tokens that it draws, which saves launches that copy them.

    In ids and last, token -1 becomes 0: its sequence ends there, and whatever is computed for it
    later is ignored. If entries of `batch_indices` are equal, any one of their tokens remains.
    """

    results: Tensor  # int32 [2, B]: tokens, and the bits of their log-probabilities in fp32
    ids: Tensor | None = None  # int64 [B] tokens, as the next step's embedding reads them
    last: Tensor | None = None  # int64 [N], table of last tokens: last[batch_indices[b]] = token
    batch_indices: Tensor | None = None  # int64 [B] in [0, N), not checked

    @staticmethod
    def of(rows: int, device: torch.device, **feeds: Tensor) -> "SampleOutput":
        """An output with newly allocated `results`."""
        return SampleOutput(torch.empty(2, rows, dtype=torch.int32, device=device), **feeds)

    @property
    def tokens(self) -> Tensor:
        return self.results[0]

    @property
    def logprobs(self) -> Tensor:
        return self.results[1].view(torch.float32)

    def write(self, tokens: Tensor, logprobs: Tensor) -> None:
        """Write int64 tokens and their fp32 log-probabilities to all outputs, in PyTorch."""
        self.tokens.copy_(tokens)
        self.logprobs.copy_(logprobs)
        next_ids = tokens.clamp_min(0)
        if self.ids is not None:
            self.ids.copy_(next_ids)
        if self.last is not None:
            assert self.batch_indices is not None  # given together with `last`
            self.last.index_copy_(0, self.batch_indices, next_ids)


def sample(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    logprobs: str = "raw",
    out: SampleOutput | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a token for each row; returns the tokens and their log-probabilities.

    logits: [B, V]; seeds, positions: int64 [B], any values. Returns tokens int32 [B] and
    log-probabilities fp32 [B]. Both are views of `out.results`, which is newly allocated unless
    `out` is given.

    Everything is fp32, except top_p's sums. temperature 0 takes the largest logit, the lowest index
    on ties. Otherwise the scores are z = (logits - max(logits)) * (1 / temperature), and tokens are
    removed in two steps:
      top_k > 0  keeps the tokens whose z is at least the k-th largest;
      top_p < 1  of those, keeps the smallest set of most probable tokens whose renormalised
                 probability reaches top_p, and every token that ties with the last of them.
    Of the rest, the token with the largest z - log(-log1p(-u)) is drawn. u = (w + 0.5) * 2^-32,
    kept below 1, where w of token v is word v % 4 of Philox4x32-10 with counter (v // 4, position
    mod 2^32, position >> 32 mod 2^32, 0) and the row's seed as key, as in `tl.philox(seed, ...)`.

    logprobs: "raw" returns the log-softmax of the logits as given at the token; "processed" that of
    z over the tokens that are left, the distribution from which the token is drawn. They are equal
    at temperature 1 without truncation. Temperature 0 always takes its token, so "processed" is 0.

    A row with NaN or +inf, or only -inf, is not a distribution: token -1, log-probability NaN.
    Raises ValueError for shapes, dtypes, devices and settings that do not fit.
    """
    if torch.compiler.is_compiling():
        out = out or SampleOutput.of(len(logits), logits.device)
        feeds = (out.results, out.ids, out.last, out.batch_indices)
        settings = (temperature, top_k, top_p, logprobs, impl)
        operators().sample(*feeds, logits, seeds, positions, *settings)
        return out.tokens, out.logprobs
    _check_tensors(logits, seeds, positions)
    # Bounds within which neither the temperature nor its inverse is subnormal in fp32.
    check(
        temperature == 0 or 2.0**-126 <= temperature <= 2.0**126,
        f"sample: temperature must be 0 or from 2^-126 to 2^126, not {temperature}",
    )
    check(
        isinstance(top_k, int) and top_k >= 0,
        f"sample: top_k must be 0 (off) or a positive integer, not {top_k}",
    )
    check(0 < top_p <= 1, f"sample: top_p must be above 0 and at most 1, not {top_p}")
    check(logprobs in LOGPROBS, f"sample: logprobs must be 'raw' or 'processed', not {logprobs!r}")
    out = out or SampleOutput.of(len(logits), logits.device)
    _check_output(out, logits)
    form = pick("sample", impl, logits.device, _SAMPLE)
    form(logits, seeds, positions, temperature, top_k, top_p, logprobs, out)
    return out.tokens, out.logprobs


def sample_triton(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    logprobs: str,
    out: SampleOutput,
) -> None:
    """`sample` in two launches, or four with top_k or top_p; see kernel.py."""
    batch, vocab = logits.shape
    _check_triton(logits)
    greedy = temperature == 0
    top_k = 0 if greedy or top_k >= vocab else top_k
    top_p = 1.0 if greedy else top_p
    truncated = top_k > 0 or top_p < 1
    # At temperature 1 without truncation both log-probabilities are the same bits.
    processed = logprobs == "processed" and (truncated or temperature != 1)
    tempered = (top_k == 0 and top_p < 1) or (processed and not truncated and not greedy)
    config = _scan_config(logits, "greedy" if greedy else "truncated" if truncated else "plain")
    block = config["block"]
    blocks = cdiv(vocab, block)
    empty = partial(torch.empty, device=logits.device)
    peaks, sums = empty(batch, blocks), empty(2, batch, blocks)
    winners = empty(batch, blocks, dtype=torch.int32)
    maxima = empty(batch, blocks * (block // GROUP.value) if truncated else 0)
    masses = empty(batch, blocks) if processed and truncated else None
    rows = {
        "logits": logits,
        "vocab": vocab,
        "stride": logits.stride(0),
        "inverse": 1 / (temperature or 1),
        "peaks": peaks,
        "blocks": blocks,
        # z + noise must round as in the definition: no fused multiply-adds except explicit ones.
        "enable_fp_fusion": False,
    }
    noise = {
        "seeds": seeds,
        "positions": positions,
        "seed_stride": seeds.stride(0),
        "position_stride": positions.stride(0),
    }
    split = {"BLOCK": block, "num_warps": config["num_warps"]}
    padded = triton.next_power_of_2(blocks)
    if batch == 0:
        return
    sample_scan_kernel[(batch * blocks,)](
        **rows, **noise, **split, sums=sums, maxima=maxima, winners=winners, size=peaks.numel(),
        GREEDY=greedy, TRUNCATED=truncated, TEMPERED=tempered,
    )  # fmt: skip
    if truncated:
        cuts = _cut(rows, sums, maxima, padded, top_k, top_p)
        sample_draw_kernel[(batch * blocks,)](
            **rows, **noise, **split, cuts=cuts, winners=winners, masses=masses, BLOCKS=padded
        )
    sample_pick_kernel[(batch,)](
        **rows, **noise, sums=sums, winners=winners, masses=masses, results=out.results,
        ids=out.ids, last=out.last, batch_indices=out.batch_indices, BLOCKS=padded, GREEDY=greedy,
        PROCESSED=processed, num_warps=1,
    )  # fmt: skip


def _cut(rows: dict, sums: Tensor, maxima: Tensor, padded: int, top_k: int, top_p: float) -> Tensor:
    """The depth of each row's cut, int32 [B]."""
    batch, groups = maxima.shape
    config = CUT.choose(dtype_name(rows["logits"].dtype), maxima.device)
    cuts = maxima.new_empty(batch, dtype=torch.int32)
    sample_cut_kernel[(batch,)](
        **rows, sums=sums, maxima=maxima, cuts=cuts,
        lists=torch.empty_like(maxima, dtype=torch.int32), top_k=top_k, top_p=top_p,
        groups=groups, size=sums[0].numel(), BLOCKS=padded, GROUPS=triton.next_power_of_2(groups),
        TILE=config["tile"], BY_COUNT=top_k > 0, BY_MASS=top_p < 1, num_warps=config["num_warps"],
        maxnreg=65536 // (32 * config["num_warps"]),  # one CTA per SM may use all registers
    )  # fmt: skip
    return cuts


def _scan_config(logits: Tensor, mode: str) -> KernelConfig:
    """How rows are split into blocks; independent of the batch, so that a row's sums are, too."""
    return SCAN.choose(f"{dtype_name(logits.dtype)} {mode}", logits.device)


def _scan_candidates(key: str, gpu: Gpu) -> list[KernelConfig]:
    """Blocks with 8, 16 or 32 tokens per thread, which stay in registers."""
    return [
        {"block": block, "num_warps": block // (32 * tokens)}
        for block in (2048, 4096, 8192)
        for tokens in (8, 16, 32)
    ]


def _cut_candidates(key: str, gpu: Gpu) -> list[KernelConfig]:
    """8 or 16 tokens per thread, with few or many threads."""
    return [
        {"tile": tile, "num_warps": warps}
        for tile, warps in ((32, 8), (64, 8), (64, 16), (128, 16))
    ]


SCAN = Tunable("sample_scan", lambda gpu: {"block": 4096, "num_warps": 8}, _scan_candidates)
CUT = Tunable("sample_cut", lambda gpu: {"tile": 64, "num_warps": 16}, _cut_candidates)


def _writing(form: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., None]:
    """A form that returns tokens and log-probabilities, as one that writes them to `out`."""

    def write(*arguments: Any) -> None:
        *inputs, out = arguments
        out.write(*form(*inputs))

    return write


_SAMPLE = {
    "eager": _writing(sample_ref),
    "portable": _writing(sample_portable),
    "triton": sample_triton,
}


def _check_triton(logits: Tensor) -> None:
    vocab = logits.shape[1]
    check(
        logits.stride(1) == 1 or vocab == 1,
        "sample: impl 'triton' needs contiguous rows of logits",
    )
    check(vocab <= 2**30, f"sample: impl 'triton' takes rows of at most 2^30 logits, not {vocab}")


def _check_output(out: SampleOutput, logits: Tensor) -> None:
    rows, words = len(logits), {"results": torch.int32}
    shapes = {"results": (2, rows), "ids": (rows,), "batch_indices": (rows,)}
    check(
        (out.last is None) == (out.batch_indices is None),
        "sample: give out.last and out.batch_indices together, or neither",
    )
    for name in ("results", "ids", "last", "batch_indices"):
        tensor, dtype = getattr(out, name), words.get(name, torch.int64)
        if tensor is None:
            continue
        shape = shapes.get(name, tuple(tensor.shape[:1]))
        check(
            tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous(),
            f"sample: out.{name} must be {dtype} {list(shape)} and contiguous,"
            f" not {tensor.dtype} {list(tensor.shape)}",
        )
        check(
            tensor.device == logits.device,
            f"sample: out.{name} must be on {logits.device} like logits, not on {tensor.device}",
        )


def _check_tensors(logits: Tensor, seeds: Tensor, positions: Tensor) -> None:
    check(
        logits.dim() == 2 and logits.shape[1] > 0,
        f"sample: logits must be [B, V], not {list(logits.shape)}",
    )
    check(logits.dtype in DTYPES, f"sample: logits must be fp32, bf16 or fp16, not {logits.dtype}")
    for name, tensor in {"seeds": seeds, "positions": positions}.items():
        check(
            tensor.shape == logits.shape[:1] and tensor.dtype == torch.int64,
            f"sample: {name} must be int64 [{len(logits)}], one per row of logits,"
            f" not {tensor.dtype} {list(tensor.shape)}",
        )
        check(
            tensor.device == logits.device,
            f"sample: {name} must be on {logits.device} like logits, not on {tensor.device}",
        )
