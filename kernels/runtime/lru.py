"""A least-recently-used cache with a budget."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any


class Lru:
    """Values by key; the least recently used are dropped when their sizes exceed `budget`."""

    def __init__(self, budget: int) -> None:
        self._items: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self.size, self.budget = 0, budget

    def __len__(self) -> int:
        return len(self._items)

    @property
    def budget(self) -> int:
        return self._budget

    @budget.setter
    def budget(self, budget: int) -> None:
        self._budget = budget
        self._drop()

    def get(self, key: Hashable) -> Any:
        """The value, which becomes the most recently used; None if there is none."""
        if key not in self._items:
            return None
        self._items.move_to_end(key)
        return self._items[key][0]

    def put(self, key: Hashable, value: Any, size: int = 1) -> None:
        """Store `value` as the most recently used, unless its size alone exceeds the budget."""
        self.size -= self._items.pop(key, (None, 0))[1]
        if size > self.budget:
            return
        self._items[key] = value, size
        self.size += size
        self._drop()

    def clear(self) -> None:
        self._items.clear()
        self.size = 0

    def _drop(self) -> None:
        while self.size > self.budget:
            _, (_, size) = self._items.popitem(last=False)
            self.size -= size
