"""`sample` as an operator that writes to the tensors of a `SampleOutput`."""

from torch import Tensor

from kernels import sampling
from kernels.torch_ops.registration import torch_op


def _nothing(*_: object, **__: object) -> None:
    pass


@torch_op(_nothing, mutates=("results", "ids", "last"))
def sample(
    results: Tensor,
    ids: Tensor | None,
    last: Tensor | None,
    batch_indices: Tensor | None,
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    logprobs: str = "raw",
    impl: str | None = None,
) -> None:
    """`sampling.sample`: draws for each row of logits [B, V]; results is int32 [2, B]."""
    sampling.sample(
        logits,
        seeds,
        positions,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        logprobs=logprobs,
        out=sampling.SampleOutput(results, ids, last, batch_indices),
        impl=impl,
    )
