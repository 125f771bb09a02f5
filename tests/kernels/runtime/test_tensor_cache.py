"""Bounded caches of tables, and pins that keep tables alive."""

from kernels.runtime.tensor_cache import cached_tensors, pinning


def test_pinning_keeps_what_is_looked_up():
    """Guards CUDA graphs: without pins, one would read freed memory once the cache is full.

    A pinned table is not computed again, even if the cache has dropped it.
    """
    computed = []

    @cached_tensors(1)
    def table(n: int) -> list[int]:
        computed.append(n)
        return [n]

    first = table(1)
    with pinning() as outer:
        assert table(1) is first
        with pinning() as inner:
            second = table(2)
        assert table(1) is first
        third = table(3)
        assert table(1) is first and table(3) is third
    assert computed == [1, 2, 3]
    assert list(outer.values()) == [first, third] and list(inner.values()) == [second]
