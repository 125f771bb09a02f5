"""Devices, and the dtypes that ops are checked and timed in on each."""

from collections.abc import Sequence

import torch

from kernels.runtime.dtypes import dtype_name
from model.errors import InputError

MAIN_DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TIMED_DTYPES = {"cpu": (torch.float32,), "cuda": DTYPES}
SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def parse_device(name: str | None) -> torch.device:
    """ "cpu" or "cuda"; None is a GPU if there is one. Raises InputError for other names and for
    "cuda" without a GPU."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in MAIN_DTYPE:
        raise InputError(f"device {name!r}: choose one of {', '.join(MAIN_DTYPE)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda': this machine has no GPU that torch can use")
    return torch.device(name)


def parse_dtypes(names: Sequence[str]) -> tuple[torch.dtype, ...]:
    """Dtypes by their long or short names. Raises InputError for a dtype that ops do not have."""
    known = {dtype_name(dtype): dtype for dtype in DTYPES}
    for name in names:
        if SHORT.get(name, name) not in known:
            raise InputError(f"unknown dtype {name!r}; choose one of {', '.join(known)}")
    return tuple(known[SHORT.get(name, name)] for name in names)
