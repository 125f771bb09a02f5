"""A typed nn.ModuleList, for mypy: items of PyTorch's own have unchecked attributes."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


class ModuleList(nn.ModuleList, Generic[M]):
    """nn.ModuleList of modules of one class."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[M]: ...
