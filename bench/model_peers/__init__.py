"""Model peers: what else a user could run for a whole decode step, a prompt or an answer."""

from collections.abc import Iterable, Sequence

import torch

from bench.model_peers.llama_cpp_peer import LLAMA_CPP
from bench.model_peers.peer import LoadedPeer, ModelPeer
from bench.model_peers.transformers_peer import TRANSFORMERS
from bench.peers.peer import Unavailable
from model.config import Config
from model.errors import InputError
from model.step3vl import Step3VL

PEERS = {peer.name: peer for peer in (LLAMA_CPP, TRANSFORMERS)}


def select(
    names: Sequence[str],
    forms: Sequence[str],
    config: Config,
    device: torch.device,
    default: Sequence[str] = tuple(PEERS),
) -> tuple[tuple[str, ...], list[ModelPeer]]:
    """Those of `names` that are among our `forms`, and those that are peers.

    Without names: all forms, and the peers of `default` that can be used here with the model.
    Raises InputError for an unknown name, and for a peer that cannot be used.
    """
    for name in names:
        if name not in (*forms, *PEERS):
            raise InputError(f"unknown form {name!r}; choose from: {', '.join((*forms, *PEERS))}")
        if name in PEERS:
            _check_usable(PEERS[name], config, device)
    if names:
        return tuple(n for n in forms if n in names), [p for n, p in PEERS.items() if n in names]
    usable = [PEERS[name] for name in default if PEERS[name].absence(config, device) is None]
    return tuple(forms), usable


def _check_usable(peer: ModelPeer, config: Config, device: torch.device) -> None:
    reason = peer.absence(config, device)
    if reason and peer.library.version() is None:
        raise InputError(f"{peer.name} is not installed; run: {peer.library.get}")
    if reason:
        raise InputError(f"{peer.name}: {reason}; leave it out of --impl")


def load(peers: Iterable[ModelPeer], model: Step3VL) -> dict[str, LoadedPeer]:
    """The peers with a model's weights, by name. Raises InputError for one that fails."""
    loaded: dict[str, LoadedPeer] = {}
    for peer in peers:
        try:
            loaded[peer.name] = peer.load(model)
        except Unavailable as reason:
            raise InputError(f"{peer.name}: {reason}") from None
    return loaded


def fields(name: str, settings: str) -> dict:
    """The fields that only a peer's rows have."""
    return {"version": PEERS[name].library.version(), "settings": settings}
