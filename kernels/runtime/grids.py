"""Token grids of image views, which vision ops take packed in one batch, one after the other."""

from collections.abc import Iterable

Grid = tuple[int, int]  # rows, columns of a view's tokens, in row-major order


def tokens_of(grids: Iterable[Grid]) -> int:
    """The number of tokens of all views together."""
    return sum(rows * columns for rows, columns in grids)
