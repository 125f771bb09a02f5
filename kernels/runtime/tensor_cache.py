"""Tensors that ops compute once per shape and keep in bounded caches: angles, tables of tiles.

A CUDA graph reads the memory of those it was captured with at every replay, long after a cache may
have dropped them. Who captures one collects them (`holding`), from a first run of the work on, and
keeps them as long as the graph. None is then computed while it is captured: that one's memory would
be the graph's, and a replay of another graph may overwrite what the cache serves.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any

_holder: ContextVar[dict[Hashable, Any] | None] = ContextVar("holder", default=None)


def kept(maxsize: int) -> Callable[[Callable], Callable]:
    """functools.lru_cache for functions that return tensors; `holding` sees what they return."""

    def decorate(function: Callable) -> Callable:
        cached = lru_cache(maxsize)(function)

        @wraps(function)
        def look_up(*args: Any) -> Any:
            return held((function, *args), lambda: cached(*args))

        return look_up

    return decorate


def held(key: Hashable, look_up: Callable[[], Any]) -> Any:
    """What `look_up` returns; for whoever is `holding`, what it returned the first time."""
    holder = _holder.get()
    if holder is None:
        return look_up()
    if key not in holder:
        holder[key] = look_up()
    return holder[key]


@contextmanager
def holding() -> Iterator[dict[Hashable, Any]]:
    """A dict that collects the tensors looked up meanwhile, each once."""
    holder: dict[Hashable, Any] = {}
    token = _holder.set(holder)
    try:
        yield holder
    finally:
        _holder.reset(token)
