"""Sampling by Gumbel noise, with top-k and top-p."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bench.errors import Error
from bench.formats.traffic import Point
from bench.inputs.draws import Device, NormalDraws
from bench.inputs.presets import BIG, SMOLLM2
from bench.suite.op import Case, Op, Shape
from kernels.runtime.arithmetic import cdiv
from kernels.sampling import sample
from model.config import Config

WORD = 2**32


def inputs(
    seed: int,
    device: Device,
    dtype: torch.dtype,
    *,
    rows: int,
    vocab: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    logprobs: str = "raw",
) -> dict:
    draw = NormalDraws(seed, device, dtype)
    return {
        "logits": draw(rows, vocab, scale=3.0),
        "seeds": torch.randint(0, 2**62, (rows,), generator=draw.host).to(device),
        "positions": torch.arange(1000, 1000 + rows, device=device),
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "logprobs": logprobs,
    }


def case(rows: int, vocab: int, **settings: float | str) -> Case:
    """`settings` are those of `sample`; they are part of the name in this order."""
    prefixes = {"temperature": "t", "top_k": "k", "top_p": "p", "logprobs": ""}
    parts = [f"{prefix}{settings[key]}" for key, prefix in prefixes.items() if key in settings]
    shape: Shape = {"rows": rows, "vocab": vocab, **settings}
    return Case(
        op="sample",
        name=" ".join([f"B{rows} V{vocab}", *parts]),
        inputs=partial(inputs, **shape),
        values=rows * vocab,
        flops=5 * rows * vocab,
        shape=shape,
    )


def cases(device_type: str) -> Iterator[Case]:
    rows, model = (16, SMOLLM2) if device_type == "cpu" else (64, BIG)
    yield case(rows, model.decoder.vocab_size)
    yield case(rows, model.decoder.vocab_size, top_k=20, top_p=0.95)


def of_traffic(point: Point, model: Config) -> Iterator[Case]:
    yield case(point.batch, model.decoder.vocab_size, top_k=20, top_p=0.95)


def checks() -> Iterator[Case]:
    yield case(3, 151936)
    yield case(17, 997, top_k=5, top_p=0.9)
    yield case(5, 9973, temperature=0.6, logprobs="processed")
    yield case(17, 997, temperature=1.3, top_k=5, top_p=0.9, logprobs="processed")


def compiled_cases() -> Iterator[Case]:
    yield case(1, 151_936, top_k=20, top_p=0.95)
    yield case(64, 151_936, temperature=0.6, logprobs="processed")
    yield case(64, 151_936, top_k=20, top_p=0.95, logprobs="processed")


def formula(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    logprobs: str,
) -> tuple[Tensor, ...]:
    """Row by row, by sorting. No row has a tie within rounding that fp32 forms could break
    differently."""
    tokens, drawn = [], []
    for row, seed, position in zip(logits, seeds.tolist(), positions.tolist(), strict=True):
        z = (row - row.max()) / temperature
        ordered = z.sort(descending=True).values
        if top_k:
            ordered = ordered[ordered >= ordered[min(top_k, len(z)) - 1]]
        mass = ordered.exp().cumsum(0)
        last = ordered[min(int((mass < top_p * mass[-1]).sum()), len(ordered) - 1)]
        noise = torch.from_numpy(_noise(len(z), seed, position))
        token = (z + noise).masked_fill(z < last, -torch.inf).argmax()
        scores = row if logprobs == "raw" else z.masked_fill(z < last, -torch.inf)
        tokens.append(token)
        drawn.append(scores[token] - scores.logsumexp(0))
    return torch.stack(tokens), torch.stack(drawn)


def _noise(vocab: int, seed: int, position: int) -> np.ndarray:
    """-log(-log1p(-u)) [vocab], with u from Philox4x32-10 in NumPy's unsigned integers."""
    index = np.arange(cdiv(vocab, 4), dtype=np.uint64)
    low, mask = np.uint64(32), np.uint64(WORD - 1)
    c = [index, *(np.full_like(index, x) for x in (position % WORD, position // WORD % WORD, 0))]
    k = [seed % WORD, seed // WORD % WORD]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        first, third = (np.uint64(key) for key in k)
        c = [(b >> low) ^ c[1] ^ first, b & mask, (a >> low) ^ c[3] ^ third, a & mask]
        k = [(k[0] + 0x9E3779B9) % WORD, (k[1] + 0xBB67AE85) % WORD]
    words = np.stack(c, 1).ravel()[:vocab].astype(np.float32)
    u = np.minimum((words + np.float32(0.5)) * np.float32(1 / WORD), np.float32(1 - 2**-24))
    return -np.log(-np.log1p(-u.astype(np.float64)))


OP = Op(
    name="sample",
    rank=60,
    run=sample,
    varies="logits",
    cases=cases,
    of_traffic=of_traffic,
    checks=checks,
    compiled=compiled_cases,
    formula=formula,
    tolerance_16=Error(0, 0),
    tolerance_32=Error(33, 29),
    results=("tokens", "logprobs"),
    fp32_results=("logprobs",),
)
