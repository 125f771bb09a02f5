"""Views of images as the vision ops take them: packed, one grid of tokens after the other."""

from collections.abc import Iterable

Grid = tuple[int, int]  # rows, columns of a view's tokens, which stand in row-major order


def tokens_of(grids: Iterable[Grid]) -> int:
    """Tokens of all views together."""
    return sum(rows * columns for rows, columns in grids)
