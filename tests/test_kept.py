"""Tables that ops keep in bounded caches, and those who must hold on to them."""

from kernels._kept import holding, kept


def test_holding_collects_what_is_looked_up():
    """A CUDA graph that does not own its tables reads other memory once the cache is full."""
    computed = []

    @kept(1)
    def table(n: int) -> list[int]:
        computed.append(n)
        return [n]

    first = table(1)
    with holding() as outer:
        assert table(1) is first
        with holding() as inner:
            table(2)
        table(1)
    table(3)
    assert computed == [1, 2, 1, 3]
    assert outer[0] is first and [outer, inner] == [[[1], [1]], [[2]]]
