"""The dtypes that ops support, and their names."""

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    """The name without "torch.", as in "bfloat16"."""
    return str(dtype).removeprefix("torch.")
