"""The prefix cache: what a prompt finds of earlier ones, compared with what is in the pages."""

from collections import Counter
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.runtime.arithmetic import cdiv
from pacore_sched.sched.prefix_cache import PrefixCache
from pacore_sched.sched.prefix_tree import OutOfPages, PrefixTree

SIZE = 4


class Prompts:
    """Prompts in a tree of pages that hold the tokens themselves."""

    def __init__(self, num_pages: int = 100, size: int = SIZE) -> None:
        self.tree = PrefixTree(num_pages, size)
        self.cache = PrefixCache(self.tree)
        self.pages: dict[int, int] = {}  # slot -> token
        self.live: list[tuple[int, tuple[int, ...]]] = []  # node, content

    def begin(
        self, content: tuple[int, ...], salt: str = "", *, written: int | None = None
    ) -> tuple[int, int]:
        """Add a prompt of which `written` tokens are written now; returns its node, and how many
        tokens were found. Raises OutOfPages."""
        above, found, wait = self.cache.take(None, salt, content, ())
        assert not wait
        node = above
        if found == len(content):
            self.tree.hold(node)
        else:
            node = self.tree.add(above)
            self.cache.add(node, above, salt, content[found:])
            try:
                self.tree.reserve(node, len(content) - found)
            except OutOfPages:
                self.end(node)
                raise
            self.write(node, content, len(content) if written is None else written)
        self.live.append((node, content))
        self.check(node, content)
        return node, found

    def write(self, node: int, content: tuple[int, ...], stop: int) -> None:
        """Write the tokens before `stop` that are missing."""
        start = self.tree.context_length(node)
        first = start - self.tree.length(node)
        if stop > start:
            self.tree.grow([node], stop - start)
            slots = self.tree.slots(node, start - first, stop - first)
            self.pages |= dict(zip(slots, content[start:stop], strict=True))

    def end(self, node: int) -> None:
        self.cache.close(node)
        self.tree.release(node)

    def check(self, node: int, content: tuple[int, ...]) -> None:
        """What the path of a prompt's node holds is its content, in as few pages as without the
        cache."""
        path = self.tree.path(node)
        slots = [slot for n in path for slot in self.tree.slots(n, 0, self.tree.length(n))]
        assert tuple(self.pages[slot] for slot in slots) == content[: len(slots)]
        pages = sum(len(self.tree.pages(n)) for n in path)
        assert pages == cdiv(len(content), self.tree.page_size)
        self.tree.check_integrity()


def tokens(count: int, first: int = 0) -> tuple[int, ...]:
    return tuple(range(first, first + count))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (tokens(11), 11),  # all of it, although it ends within a page
        (tokens(10), 8),
        (tokens(9) + tokens(5, 50), 8),
        (tokens(11) + tokens(5, 50), 8),
        (tokens(8), 8),
        (tokens(7), 4),
        (tokens(3), 0),  # less than a page
        (tokens(3) + tokens(9, 50), 0),
        (tokens(11, 1), 0),
    ],
)
@pytest.mark.parametrize("running", [True, False])
def test_finds_whole_pages(content: tuple[int, ...], found: int, running: bool):
    prompts = Prompts()
    node, nothing = prompts.begin(tokens(11))
    assert nothing == 0
    if not running:
        prompts.end(node)
    assert prompts.begin(content)[1] == found


def test_conversations_grow():
    """Each turn finds the whole pages of the turn before; another conversation, the beginning."""
    prompts = Prompts()
    for length, found in ((9, 0), (20, 8), (31, 20), (32, 28)):
        node, seen = prompts.begin(tokens(length))
        assert seen == found
        prompts.end(node)
    assert prompts.begin(tokens(10) + tokens(10, 90))[1] == 8
    assert prompts.begin(tokens(10) + tokens(10, 90))[1] == 20
    assert prompts.begin(tokens(32))[1] == 32
    branch = tokens(12) + tokens(8, 80)  # cuts a node, whose rest is still found
    assert prompts.begin(branch)[1] == 12
    assert prompts.begin(tokens(30))[1] == 28


def test_salts_are_apart():
    prompts = Prompts()
    prompts.begin(tokens(16), "one")
    assert prompts.begin(tokens(16))[1] == 0
    assert prompts.begin(tokens(16), "other")[1] == 0
    assert prompts.begin(tokens(16), "one")[1] == 16


def test_a_prompt_that_is_being_written():
    """Tokens that nothing has written, or will only write in this step, are not found; the writer
    goes on below what others have taken from it."""
    prompts = Prompts()
    content = tokens(16)
    node, _ = prompts.begin(content, written=10)
    assert prompts.cache.take(None, "", content, {node}).wait
    assert not prompts.cache.take(None, "", tokens(16, 5), {node}).wait
    assert prompts.begin(content)[1] == 8
    prompts.write(node, content, 16)
    prompts.check(node, content)


def test_a_cancelled_prompt():
    """What it has written is found, and the pages of the rest are free."""
    prompts = Prompts()
    node, _ = prompts.begin(tokens(40), written=10)
    assert prompts.tree.free_pages == 90
    prompts.end(node)
    assert prompts.tree.free_pages == 100
    assert sum(len(prompts.tree.pages(n)) for n in prompts.tree.kept) == 3
    assert prompts.begin(tokens(40))[1] == 8
    short, _ = prompts.begin(tokens(40, 100), written=3)
    prompts.end(short)
    assert prompts.begin(tokens(40, 100))[1] == 0


def test_the_longest_unused_go_first():
    prompts = Prompts(num_pages=10)
    first, second, third = ((prompts.begin(tokens(12, n))[0]) for n in (100, 200, 300))
    for node in (second, first, third):
        prompts.end(node)
    again, found = prompts.begin(tokens(12, 200))
    assert found == 12
    prompts.end(again)
    prompts.begin(tokens(8, 400))  # takes the last free page, and one of the first prompt
    found = {n: prompts.cache.take(None, "", tokens(12, n), ()).length for n in (100, 200, 300)}
    assert found == {100: 8, 200: 12, 300: 12}
    prompts.begin(tokens(16, 500))
    found = {n: prompts.cache.take(None, "", tokens(12, n), ()).length for n in (100, 200, 300)}
    assert found == {100: 0, 200: 12, 300: 4}


def test_a_branch_within_a_page():
    """What comes after the end of an image head, which another prompt has cut within its last
    page."""
    prompts = Prompts()
    head, _ = prompts.begin(tokens(10))
    prompts.begin(tokens(10) + tokens(6, 50))
    assert prompts.begin(tokens(10))[1] == 10
    after = prompts.tree.add(head)
    prompts.cache.add(after, head, "", tokens(8, 90))
    prompts.tree.append(after, 8)
    assert prompts.cache.take(head, "", tokens(8, 90), ()).length == 8


def test_cleared():
    """KV that a failed step may not have written, found afterwards."""
    prompts = Prompts()
    kept, _ = prompts.begin(tokens(12))
    prompts.end(kept)
    used, _ = prompts.begin(tokens(12, 50))
    prompts.cache.clear()
    assert not prompts.tree.kept
    prompts.tree.check_integrity({used: 1})
    assert prompts.begin(tokens(12))[1] == prompts.begin(tokens(12, 50))[1] == 0
    prompts.end(used)


def test_used_pages_are_never_taken():
    prompts = Prompts(num_pages=6)
    prompts.begin(tokens(12))
    kept, _ = prompts.begin(tokens(8, 100))
    prompts.end(kept)
    with pytest.raises(OutOfPages, match="needs 4 pages, the pool has 3 free"):
        prompts.begin(tokens(16, 200))
    prompts.begin(tokens(12, 200))
    assert not prompts.tree.kept


TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=14).map(tuple)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 4), st.integers(6, 20))
def test_any_prompts(data: st.DataObject, size: int, num_pages: int):
    """KV of another prompt, pages in two nodes or in none, more pages than without the cache."""
    prompts = Prompts(num_pages, size)
    for _ in range(data.draw(st.integers(1, 12))):
        if prompts.live and data.draw(st.booleans()):
            index = data.draw(st.integers(0, len(prompts.live) - 1))
            node, content = prompts.live[index]
            if data.draw(st.booleans()):
                prompts.write(node, content, data.draw(st.integers(0, len(content))))
                prompts.check(node, content)
            else:
                prompts.end(prompts.live.pop(index)[0])
        else:
            content = data.draw(TEXTS)
            with suppress(OutOfPages):
                prompts.begin(content, written=data.draw(st.integers(0, len(content))))
        prompts.tree.check_integrity(Counter(node for node, _ in prompts.live))
    for node, content in prompts.live:
        prompts.check(node, content)
        prompts.end(node)
    prompts.tree.check_integrity({})
    assert prompts.tree.free_pages == num_pages
