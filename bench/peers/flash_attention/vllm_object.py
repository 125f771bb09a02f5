"""FlashAttention from vLLM's wheel: a shared object with torch ops that do not need vLLM.

FA2_LIBRARY and FA3_LIBRARY name the object to load (`_vllm_fa3_C*.so`); otherwise that of an
installed vllm is used.
"""

import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from bench.peers.peer import Unavailable, distribution


@cache
def loaded(number: int) -> ModuleType | None:
    """The torch.ops namespace of FlashAttention 2 or 3; None if there is no object."""
    path = _path(number)
    if path is None:
        return None
    try:
        torch.ops.load_library(path)
    except OSError as error:
        cause = error.__cause__ or error
        raise Unavailable(f"{path} does not load ({str(cause).splitlines()[0]})") from None
    return getattr(torch.ops, f"_vllm_fa{number}_C")


def version(number: int, package: str) -> str | None:
    """The path from the environment, the installed vllm's version, or that of `package`."""
    path = os.environ.get(f"FA{number}_LIBRARY")
    return path or distribution("vllm", package)()


def arguments(op: torch._ops.OpOverloadPacket, named: dict) -> list:
    """The values of `named` in the order of the op's schema, None for missing ones."""
    return [named.get(argument.name) for argument in op.default._schema.arguments]


def unmasked(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, max_length: int) -> dict:
    """Arguments of both versions' ops for unmasked attention within packed sequences."""
    return {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens_q": starts,
        "cu_seqlens_k": starts,
        "max_seqlen_q": max_length,
        "max_seqlen_k": max_length,
        "softmax_scale": q.shape[2] ** -0.5,
        "is_causal": False,
        "window_size_left": -1,
        "window_size_right": -1,
    }


def _path(number: int) -> str | None:
    path = os.environ.get(f"FA{number}_LIBRARY")
    vllm = find_spec("vllm")
    folders = (vllm and vllm.submodule_search_locations) or ()
    pattern = f"*/_vllm_fa{number}_C*.so"
    objects = [file for folder in folders for file in Path(folder).glob(pattern)]
    return path or (str(objects[0]) if objects else None)
