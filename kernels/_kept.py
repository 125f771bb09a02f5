"""Tensors that ops compute once per shape and keep in bounded caches: angles, tables of tiles.

A CUDA graph reads the memory of those it was captured with at every replay, long after a cache may
have dropped them. Who captures one collects them (`holding`) and keeps them as long as the graph.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any

_holder: ContextVar[list | None] = ContextVar("holder", default=None)


def kept(maxsize: int) -> Callable[[Callable], Callable]:
    """functools.lru_cache for functions that return tensors; `holding` sees what they return."""

    def decorate(function: Callable) -> Callable:
        cached = lru_cache(maxsize)(function)

        @wraps(function)
        def look_up(*args: Any) -> Any:
            return hold(cached(*args))

        return look_up

    return decorate


def hold(value: Any) -> Any:
    """`value`, noted for whoever is `holding`."""
    holder = _holder.get()
    if holder is not None:
        holder.append(value)
    return value


@contextmanager
def holding() -> Iterator[list]:
    """A list that collects the tensors looked up meanwhile."""
    held: list = []
    token = _holder.set(held)
    try:
        yield held
    finally:
        _holder.reset(token)
