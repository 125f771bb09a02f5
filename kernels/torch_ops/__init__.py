"""The ops as PyTorch operators, torch.ops.pacore.<op>: importing this package registers them.

    import kernels.torch_ops
    y = torch.ops.pacore.rms_norm(x, weight, eps=1e-6)

The functions of `kernels` call these themselves while torch.compile or torch.export traces them, so
that a graph has one node per op, and their own code otherwise, because PyTorch's dispatcher adds
microseconds to every call (`python -m bench dispatch`).

registration   defines an operator from a typed function and its fake form
rows           norms and activations
attention      attention, rotation and the KV store; plans and pages as tensors
vision         the vision tower's ops and the projector
gemm           the Triton GEMM's products, which the projector and linear_quick_gelu consist of
sampling       sample

Not registered are `prefix_attention.advance` and `PrefixPlan.refill`, which change the host's view
of a plan as well: call them between compiled steps.
"""

from kernels.torch_ops import attention, gemm, rows, sampling, vision
from kernels.torch_ops.registration import names

__all__ = ["attention", "gemm", "names", "rows", "sampling", "vision"]
