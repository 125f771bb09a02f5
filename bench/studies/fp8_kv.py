"""Effect of FP8 KV pages on a real model's next-token distributions: `python -m bench fp8`."""

import torch
from torch import Tensor

from bench.measure.origin import LICENCE, origin
from kernels.runtime.arithmetic import cdiv
from model.decoder import Step
from model.step3vl import Step3VL

TOKENS = 1536  # of the licence's text


def run(device: torch.device) -> list[dict]:
    """One row: SmolLM2 on this repository's licence, with pages in its dtype and in FP8."""
    model = Step3VL.from_preset("smollm2-135m", device=device)
    text = " ".join(LICENCE.read_text().split())
    ids = torch.tensor(model.tokenizer.encode(text)[:TOKENS], device=device)
    metrics = compare(logits(model, ids), logits(model, ids, torch.float8_e4m3fn), ids)
    return [{"op": "fp8_kv", "case": model.config.name} | metrics | origin(device)]


def logits(model: Step3VL, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Logits [T, vocab] of ids [T] over KV pages of `dtype`; None is the model's dtype."""
    cache = model.new_cache(cdiv(len(ids), 64), dtype)
    with torch.inference_mode():
        embeddings = model.decoder.embed(ids)
        step = Step.of_sequence(0, len(ids), cache)
        return model.decoder.logits(model.decoder(embeddings, step, cache))


def compare(expected: Tensor, result: Tensor, ids: Tensor) -> dict:
    """How far the distributions after each of `ids` [T] are from the expected ones.

    The logits' RMS error relative to their RMS, the share of equal top-1 tokens, KL divergence in
    nats (mean and 99th percentile), and the loss of both.
    """
    expected, result = expected.double(), result.double()
    old, new = expected.log_softmax(-1), result.log_softmax(-1)
    divergence = (old.exp() * (old - new)).sum(-1)
    losses = (-x[:-1].gather(1, ids[1:, None]).mean().item() for x in (old, new))
    return {
        "tokens": len(ids),
        "rms_err": ((result - expected).square().mean() / expected.square().mean()).sqrt().item(),
        "same_top1": (expected.argmax(-1) == result.argmax(-1)).double().mean().item(),
        "kl_mean": divergence.mean().item(),
        "kl_p99": divergence.quantile(0.99).item(),
        **dict(zip(("loss", "loss_fp8"), losses, strict=True)),
    }
