"""Tables that ops keep in bounded caches, and those who must hold on to them."""

from kernels.runtime.tensor_cache import cached_tensors, pinning


def test_holding_collects_what_is_looked_up():
    """A CUDA graph that does not own its tables reads other memory once the cache is full.

    One that is looked up again is not computed again, even if the cache has dropped it.
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
