"""Comparators that are no form of an op: what else a user could call for the same result.

A peer takes an op's inputs and returns the call to time. What it prepares before is not timed, as
the plan of prefix attention is not: both depend on the batch, not on its numbers. A library that is
not there, or that cannot take an input, raises `Unavailable` and says why.

A paged peer reads a shared prefix from physical pages that all sequences' tables point at, so that
after the first sequence it comes from the L2 cache. What attention costs without any sharing, as
when each request came with its own copy, is what the peers "-copied" show.
"""

import os
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

import torch

from bench.peers import fa3_peer, flashinfer_peer, xformers_peer
from bench.peers.flex_peer import flex
from bench.peers.layout import Unavailable as Unavailable
from bench.peers.projector_peer import cudnn
from bench.peers.sdpa_peer import sdpa
from bench.peers.vision_peer import PREPARED, vision

Peer = Callable[[dict], Callable[[], object]]

PREFIX: dict[str, Peer] = {
    "sdpa": sdpa,
    "sdpa-reuse": partial(sdpa, reuse=True),
    "flex": flex,
    "flashinfer": flashinfer_peer.plain,
    "flashinfer-copied": partial(flashinfer_peer.plain, copied=True),
    "flashinfer-cascade": flashinfer_peer.cascade,
    "fa3": fa3_peer.one_call,
    "fa3-copied": partial(fa3_peer.one_call, copied=True),
    "fa3-cascade": fa3_peer.cascade,
    "xformers": xformers_peer.split_k,
}
VISION: dict[str, Peer] = {
    name + suffix: partial(vision, prepare=prepare, alone=bool(suffix))
    for name, prepare in PREPARED.items()
    for suffix in ("", "-alone")
}
PROJECTOR: dict[str, Peer] = {"cudnn": cudnn, "cudnn-folded": partial(cudnn, folded=True)}
PEERS = PREFIX | VISION | PROJECTOR
CUDA_PEERS, CPU_PEERS = tuple(PREFIX), ("sdpa", "sdpa-reuse")  # of prefix attention
PACKAGES = {
    "fa2": ("flash_attn",),
    "flashinfer": ("flashinfer-python",),
    "fa3": ("vllm", "flash_attn_3"),
    "xformers": ("xformers",),
}


def version(name: str) -> str | None:
    """The package behind a peer, as in "xformers 0.0.35"; None for torch and this project."""
    if "cudnn" in name and torch.backends.cudnn.is_available():
        return f"cudnn {torch.backends.cudnn.version()}"
    for package in PACKAGES.get(name.partition("-")[0], ()):
        try:
            return f"{package} {installed(package)}"
        except PackageNotFoundError:
            continue
    return os.environ.get("FA3_LIBRARY") if name.startswith("fa3") else None
