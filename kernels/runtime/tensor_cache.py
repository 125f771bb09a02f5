"""Bounded caches of tensors that depend on shapes only: rotary angles, tables of row tiles.

A captured CUDA graph reads these tensors at every replay, possibly long after a cache has evicted
them. Code that captures a graph therefore pins them (`pinning`), starting with the warm-up run, and
keeps the pinned tensors as long as the graph. Pinning from the warm-up on also ensures that no
cached tensor is computed during capture, where its memory would come from the graph's own pool and
could be overwritten by the replay of another graph.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any

_pins: ContextVar[dict[Hashable, Any] | None] = ContextVar("pins", default=None)


def cached_tensors(maxsize: int) -> Callable[[Callable], Callable]:
    """functools.lru_cache for functions that return tensors, which `pinning` keeps alive."""

    def decorate(function: Callable) -> Callable:
        cached = lru_cache(maxsize)(function)

        @wraps(function)
        def look_up(*args: Any) -> Any:
            return pinned((function, *args), lambda: cached(*args))

        return look_up

    return decorate


def pinned(key: Hashable, look_up: Callable[[], Any]) -> Any:
    """The result of `look_up`; inside `pinning`, the result of its first call for this key."""
    pins = _pins.get()
    if pins is None:
        return look_up()
    if key not in pins:
        pins[key] = look_up()
    return pins[key]


@contextmanager
def pinning() -> Iterator[dict[Hashable, Any]]:
    """Collect every cached tensor that is looked up inside, by key, and yield the dict of them."""
    pins: dict[Hashable, Any] = {}
    token = _pins.set(pins)
    try:
        yield pins
    finally:
        _pins.reset(token)
