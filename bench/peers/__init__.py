"""Peers: what else a user could call for an op's result, such as other libraries.

A paged peer reads a shared prefix from physical pages that all sequences' page tables point to, so
after the first sequence it comes from the L2 cache. The peers "-copied" show the cost of attention
without sharing, where each request has its own copy.
"""

from functools import partial

from bench.peers import fa2_peer, fa3_peer, flashinfer_peer, liger_peer
from bench.peers.compile_peer import COMPILE, compiled
from bench.peers.fa2_peer import FA2
from bench.peers.fa3_peer import FA3
from bench.peers.fasttree_peer import FASTTREE, tree
from bench.peers.flashinfer_peer import FLASHINFER
from bench.peers.flex_peer import flex
from bench.peers.liger_peer import LIGER
from bench.peers.peer import TORCH, Library, Peer, Prepare
from bench.peers.peer import Unavailable as Unavailable
from bench.peers.projector_peer import CUDNN, cudnn
from bench.peers.sdpa_peer import sdpa
from bench.peers.vision_peer import PREPARED, vision
from bench.peers.xformers_peer import XFORMERS, split_k
from kernels.activation import quick_gelu, silu_mul
from kernels.linear_quick_gelu import linear_quick_gelu
from kernels.norm import layer_norm, rms_norm
from kernels.projector import projector
from kernels.qk_norm_rope import qk_norm_rope

ATTENTION = (
    ("sdpa", TORCH, sdpa),
    ("sdpa-flash", TORCH, partial(sdpa, backend="FLASH_ATTENTION")),
    ("sdpa-cudnn", CUDNN, partial(sdpa, backend="CUDNN_ATTENTION")),
    ("flex", COMPILE, flex),
    ("flashinfer", FLASHINFER, flashinfer_peer.plain),
    ("flashinfer-copied", FLASHINFER, partial(flashinfer_peer.plain, copied=True)),
    ("flashinfer-cascade", FLASHINFER, flashinfer_peer.cascade),
    ("fa2", FA2, fa2_peer.one_call),
    ("fa2-copied", FA2, partial(fa2_peer.one_call, copied=True)),
    ("fa3", FA3, fa3_peer.one_call),
    ("fa3-copied", FA3, partial(fa3_peer.one_call, copied=True)),
    ("fa3-cascade", FA3, fa3_peer.cascade),
    ("fasttree", FASTTREE, tree),
    ("xformers", XFORMERS, split_k),
)
VISION = tuple(
    (name + suffix, library, partial(vision, prepare=prepare, alone=bool(suffix)))
    for name, (library, prepare) in PREPARED.items()
    for suffix in ("", "-alone")
)
ENTRIES: dict[str, tuple[tuple[str, Library, Prepare], ...]] = {
    "prefix_attention": ATTENTION,
    "vision_attention": VISION,
    "projector": (
        ("cudnn", CUDNN, cudnn),
        ("cudnn-folded", CUDNN, partial(cudnn, folded=True)),
        ("compile", COMPILE, partial(compiled, projector)),
    ),
    "qk_norm_rope": (("compile", COMPILE, partial(compiled, qk_norm_rope)),),
    "rms_norm": (
        ("compile", COMPILE, partial(compiled, rms_norm)),
        ("liger", LIGER, liger_peer.rms_norm),
        ("flashinfer", FLASHINFER, flashinfer_peer.rms_norm),
    ),
    "layer_norm": (
        ("compile", COMPILE, partial(compiled, layer_norm)),
        ("liger", LIGER, liger_peer.layer_norm),
    ),
    "silu_mul": (
        ("compile", COMPILE, partial(compiled, silu_mul)),
        ("liger", LIGER, liger_peer.silu_mul),
        ("flashinfer", FLASHINFER, flashinfer_peer.silu_mul),
    ),
    "quick_gelu": (("compile", COMPILE, partial(compiled, quick_gelu)),),
    "linear_quick_gelu": (("compile", COMPILE, partial(compiled, linear_quick_gelu)),),
}
ON_CPU = {("prefix_attention", "sdpa")}  # timed on a CPU by default
PEERS: dict[str, dict[str, Peer]] = {  # by op, then by name
    op: {
        name: Peer(name, op, prepare, library, on_cpu=(op, name) in ON_CPU)
        for name, library, prepare in entries
    }
    for op, entries in ENTRIES.items()
}
NAMES = tuple(dict.fromkeys(name for peers in PEERS.values() for name in peers))


def peers_on(device_type: str, op: str) -> tuple[str, ...]:
    """The op's peers that are timed on a type of device by default."""
    return tuple(n for n, peer in PEERS.get(op, {}).items() if peer.on_cpu or device_type != "cpu")


def version(op: str, name: str) -> str | None:
    """The library of an op's peer, as in "xformers 0.0.35"; None for our own forms."""
    peer = PEERS.get(op, {}).get(name)
    return peer.library.version() if peer else None
