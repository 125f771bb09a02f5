"""Builds a FlashInfer module that peers call: `python -m bench.bundles.flashinfer_modules NAME`.

For bf16 and head_dim 128, without a window; FlashInfer compiles everything else at its first call.
This is a separate process because FlashInfer reads the environment when it is imported. It needs
FlashInfer, any torch, nvcc and a C++ compiler, but no GPU, and prints the shared object's path.
Written against flashinfer-python 0.6.13.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch

MODULES = ("cascade", "page", "silu_and_mul", "prefill-fa2", "prefill-fa3", "norm")
# `norm` needs cublasLt.h, which is part of torch for CUDA: it is built only if it is named.
DEFAULT = MODULES[:-1]


def build(name: str) -> str:
    """Build a module; returns its shared object's path, whose stem is FlashInfer's name for it."""
    spec = _generator(name)()
    spec.build(verbose=False)
    return str(spec.get_library_path())


def _generator(name: str) -> Callable:
    from flashinfer.jit import activation, cascade, norm, page
    from flashinfer.jit.attention.modules import gen_batch_prefill_module

    # Decode with tensor cores runs prefill's fa2 kernels; on Hopper, prefill runs fa3's.
    prefill = partial(
        gen_batch_prefill_module,
        dtype_q=torch.bfloat16,
        dtype_kv=torch.bfloat16,
        dtype_o=torch.bfloat16,
        dtype_idx=torch.int32,
        head_dim_qk=128,
        head_dim_vo=128,
        pos_encoding_mode=0,
        use_sliding_window=False,
        use_logits_soft_cap=False,
        use_fp16_qk_reduction=False,
    )
    return {
        "cascade": cascade.gen_cascade_module,
        "page": page.gen_page_module,
        "silu_and_mul": partial(activation.gen_act_and_mul_module, "silu"),
        "prefill-fa2": partial(prefill, backend="fa2"),
        "prefill-fa3": partial(prefill, backend="fa3"),
        "norm": norm.gen_norm_module,
    }[name]


if __name__ == "__main__":
    print(build(sys.argv[1]))
