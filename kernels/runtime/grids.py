"""Token grids of image views, which vision ops take packed in one batch, one after the other."""

from collections.abc import Iterable, Sequence

Grid = tuple[int, int]  # rows, columns of a view's tokens, in row-major order


def tokens_of(grids: Iterable[Grid]) -> int:
    """The number of tokens of all views together."""
    return sum(rows * columns for rows, columns in grids)


def sides_of(grids: Iterable[Grid]) -> list[int]:
    """Grids as operators of PyTorch take them: rows and columns of one view after the other."""
    return [side for grid in grids for side in grid]


def grids_of(sides: Sequence[int]) -> list[Grid]:
    """The grids of `sides_of`."""
    return list(zip(sides[::2], sides[1::2], strict=True))
