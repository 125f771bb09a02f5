"""Sampling of token ids from logits: temperature, top-k, top-p, counter-based random numbers."""

from kernels.sampling.op import LOGPROBS, SampleOutput, sample
from kernels.sampling.philox import philox4x32
from kernels.sampling.reference import sample_ref

__all__ = ["LOGPROBS", "SampleOutput", "philox4x32", "sample", "sample_ref"]
