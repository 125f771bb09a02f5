"""FlashAttention as vLLM's wheel carries it: a shared object with torch ops, which need no vLLM.

FA2_LIBRARY and FA3_LIBRARY name an object to load (`_vllm_fa3_C*.so`); else it is looked for in an
installed vllm.
"""

import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from bench.peers.peer import Unavailable, distribution


@cache
def loaded(number: int) -> object | None:
    """The namespace of torch.ops of FlashAttention 2 or 3; None if there is no object."""
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
    """The path that was named, the installed vllm's version, or that of `package`."""
    named = os.environ.get(f"FA{number}_LIBRARY")
    return named or distribution("vllm", package)()


def arguments(op: torch._ops.OpOverloadPacket, given: dict) -> list:
    """`given` in the order of the op's schema, None for what it does not name."""
    return [given.get(argument.name) for argument in op.default._schema.arguments]


def unmasked(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> dict:
    """What both versions' ops are given for attention without a mask within packed sequences."""
    return {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens_q": starts,
        "cu_seqlens_k": starts,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
        "softmax_scale": q.shape[2] ** -0.5,
        "is_causal": False,
        "window_size_left": -1,
        "window_size_right": -1,
    }


def _path(number: int) -> str | None:
    named = os.environ.get(f"FA{number}_LIBRARY")
    vllm = find_spec("vllm")
    places = vllm.submodule_search_locations if vllm else ()
    found = [path for place in places for path in Path(place).glob(f"*/_vllm_fa{number}_C*.so")]
    return named or (str(found[0]) if found else None)
