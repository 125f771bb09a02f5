"""Sampling of token ids from logits: temperature, top-k, top-p, counter-based random numbers."""

from kernels.sampling.op import LOGPROBS, SampleOutput, philox4x32, sample, sample_ref

__all__ = ["LOGPROBS", "SampleOutput", "philox4x32", "sample", "sample_ref"]
