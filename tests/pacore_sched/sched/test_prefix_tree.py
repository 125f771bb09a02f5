"""The prefix tree compared with a brute-force model; its integrity check on broken trees."""

import sys
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pacore_sched.sched.prefix_tree import IntegrityError, OutOfPages, PrefixTree


class AgainstModel(RuleBasedStateMachine):
    """Random use of the tree, compared with a model that stores every token and searches
    everything. No node that is kept grows or is cut.

    `memory` represents the page tensors: each token's slot is stamped with (node, index), and must
    keep that stamp as long as the node lives.
    """

    @initialize(num_pages=st.integers(1, 12), page_size=st.integers(1, 4))
    def start(self, num_pages, page_size):
        self.evicted = []
        self.tree = PrefixTree(num_pages, page_size)
        self.tree.on_evict = lambda *cut: self.evicted.append(cut)
        self.num_pages, self.page_size = num_pages, page_size
        self.keepable, self.kept = set(), []  # kept: unused for the longest time first
        self.parents, self.lengths, self.holds = {}, {}, Counter()
        self.spare = Counter()  # reserved pages of a node beyond those that its tokens need
        self.dead, self.memory = set(), {}

    def children(self, node):
        return [n for n, parent in self.parents.items() if parent == node]

    def model_path(self, node):
        above = [] if self.parents[node] is None else self.model_path(self.parents[node])
        return [*above, node]

    def pages_of(self, tokens):
        return len({token // self.page_size for token in range(tokens)})

    def model_free(self):
        return self.num_pages - sum(map(self.owned, self.parents.keys() - self.kept))

    def owned(self, node):
        return self.pages_of(self.lengths[node]) + self.spare[node]

    def remove(self, node):
        del self.parents[node], self.lengths[node], self.spare[node]
        self.dead.add(node)

    def use(self, node):
        """Nothing on a used node's path is kept."""
        self.kept = [kept for kept in self.kept if kept not in self.model_path(node)]

    def evict(self, pages):
        """Take the pages of kept nodes for `pages` new ones."""
        expected = []
        while (lacking := pages - self.num_pages + sum(map(self.owned, self.parents))) > 0:
            node = self.kept[0]
            left = min(self.lengths[node], (self.owned(node) - lacking) * self.page_size)
            expected.append((node, max(left, 0)))
            if left > 0:
                self.lengths[node] = left
                self.spare[node] = 0
            else:
                self.remove(self.kept.pop(0))
        assert self.evicted == expected
        self.evicted.clear()

    def stamp(self, node, tokens):
        """Record that tokens were appended, and write their slots."""
        length = self.lengths[node]
        before = self.pages_of(length) + self.spare[node]
        self.lengths[node] += tokens
        self.spare[node] = max(0, before - self.pages_of(length + tokens))
        for i, slot in enumerate(self.tree.slots(node, length, length + tokens)):
            self.memory[slot] = (node, length + i)

    def pick(self, data, nodes):
        return data.draw(st.sampled_from(sorted(nodes)))

    @rule(data=st.data())
    def add(self, data):
        parent = data.draw(st.sampled_from([None, *sorted(self.parents)]))
        node = self.tree.add(parent)
        assert node not in self.parents and node not in self.dead
        if parent is not None:
            self.use(parent)
        self.parents[node], self.lengths[node], self.holds[node] = parent, 0, 1

    @precondition(lambda self: self.parents)
    @rule(data=st.data(), new_tokens=st.integers(0, 9), keep=st.booleans())
    def append(self, data, new_tokens, keep):
        """Append tokens, or only reserve pages for them."""
        node = self.pick(data, self.parents)
        if node in self.kept:
            return
        call = self.tree.append if keep else self.tree.reserve
        if self.children(node):
            with pytest.raises(ValueError, match="cannot grow"):
                call(node, new_tokens)
            return
        length = self.lengths[node]
        owned = self.pages_of(length) + self.spare[node]
        needed = max(0, self.pages_of(length + new_tokens) - owned)
        assert self.tree.pages_needed(node, new_tokens) == needed
        if needed > self.model_free():
            with pytest.raises(OutOfPages):
                call(node, new_tokens)
            return
        call(node, new_tokens)
        self.evict(needed)
        self.spare[node] += needed
        if keep:
            self.stamp(node, new_tokens)

    @precondition(lambda self: any(not self.children(node) for node in self.parents))
    @rule(data=st.data(), tokens=st.integers(0, 3))
    def grow(self, data, tokens):
        leaves = [n for n in self.parents if not self.children(n) and n not in self.kept]
        if not leaves:
            return
        nodes = data.draw(st.lists(st.sampled_from(sorted(leaves)), min_size=1, unique=True))
        full = [node for node in nodes if self.tree.room(node) < tokens]
        for node in nodes:
            pages = self.pages_of(self.lengths[node]) + self.spare[node]
            assert self.tree.room(node) == pages * self.page_size - self.lengths[node]
        if full:
            with pytest.raises(ValueError, match=f"node {full[0]} has no room"):
                self.tree.grow(full[:1], tokens)
            return
        self.tree.grow(nodes, tokens)
        for node in nodes:
            self.stamp(node, tokens)

    @precondition(lambda self: self.parents)
    @rule(data=st.data())
    def truncate(self, data):
        node = self.pick(data, self.parents)
        if node in self.kept:
            return
        length = data.draw(st.integers(-1, self.lengths[node] + 1))
        if self.children(node) or not 0 <= length <= self.lengths[node]:
            with pytest.raises(ValueError, match="cannot be cut"):
                self.tree.truncate(node, length)
            return
        self.tree.truncate(node, length)
        self.lengths[node], self.spare[node] = length, 0

    @precondition(lambda self: self.parents)
    @rule(data=st.data())
    def hold(self, data):
        node = self.pick(data, self.parents)
        self.tree.hold(node)
        self.use(node)
        self.holds[node] += 1

    @precondition(lambda self: self.parents)
    @rule(data=st.data())
    def keep(self, data):
        """Only nodes with users, and below keepable ones."""
        above = {None, *self.keepable}
        nodes = [n for n, p in self.parents.items() if p in above and n not in self.kept]
        if nodes:
            node = self.pick(data, nodes)
            self.tree.set_keepable(node, True)
            self.keepable.add(node)

    @precondition(lambda self: self.parents)
    @rule(data=st.data())
    def split(self, data):
        node = self.pick(data, self.parents)
        length = data.draw(st.integers(0, self.lengths[node] + 1))
        if node in self.kept or not 0 < length <= self.lengths[node] or length % self.page_size:
            with pytest.raises(ValueError, match="cannot be split"):
                self.tree.split(node, length)
            return
        above = self.tree.split(node, length)
        assert above not in self.parents and above not in self.dead
        self.parents[above], self.parents[node] = self.parents[node], above
        self.lengths[above], self.lengths[node] = length, self.lengths[node] - length
        if node in self.keepable:
            self.keepable.add(above)
        for slot, (owner, index) in self.memory.items():
            if owner == node:
                self.memory[slot] = (above, index) if index < length else (node, index - length)

    @precondition(lambda self: self.parents)
    @rule(data=st.data())
    def release(self, data):
        node = self.pick(data, self.parents)
        if not self.holds[node]:
            with pytest.raises(ValueError, match="is not held"):
                self.tree.release(node)
            return
        self.tree.release(node)
        self.holds[node] -= 1
        alive = {n for held in self.parents if self.holds[held] for n in self.model_path(held)}
        unused = set(self.parents) - alive - set(self.kept)
        for freed in sorted(unused, key=lambda n: -len(self.model_path(n))):
            if freed in self.keepable:
                self.kept.append(freed)
            else:
                self.remove(freed)

    @precondition(lambda self: self.dead)
    @rule(data=st.data())
    def use_a_freed_node(self, data):
        node = self.pick(data, self.dead)
        for call in (self.tree.add, self.tree.hold, self.tree.release, self.tree.path):
            with pytest.raises(ValueError, match="not in the tree"):
                call(node)

    @invariant()
    def agrees(self):
        self.tree.check_integrity(+self.holds)
        assert list(self.tree.kept) == self.kept
        assert self.tree.free_pages == self.model_free()
        assert list(self.tree.nodes) == sorted(self.lengths)
        assert self.tree.num_pages_of(self.lengths) == sum(map(self.owned, self.lengths))
        for node, length in self.lengths.items():
            path = self.model_path(node)
            assert self.tree.path(node) == tuple(path)
            assert self.tree.length(node) == length
            assert self.tree.context_length(node) == sum(self.lengths[n] for n in path)
            slots = self.tree.slots(node, 0, length)
            assert [self.memory[slot] for slot in slots] == [(node, i) for i in range(length)]
            pages = tuple(dict.fromkeys(s // self.page_size for s in slots))
            assert pages == self.tree.pages(node)[: len(pages)]
            assert len(self.tree.pages(node)) == len(pages) + self.spare[node]
            users = [n for n in self.children(node) if n not in self.kept]
            assert self.tree.is_idle(node) == (not users)
            start = sum(self.lengths[above] for above in path[:-1])
            owned = len(pages) + self.spare[node]
            assert self.tree.extent(node) == (node, self.parents[node], start, length, owned)

    @invariant()
    def orders_depth_first(self):
        expected, stack = [], sorted((n for n, p in self.parents.items() if p is None))[::-1]
        while stack:
            expected.append(node := stack.pop())
            stack.extend(sorted(self.children(node), reverse=True))
        paths = self.tree.depth_first(sorted(self.parents, reverse=True))
        assert [path[-1] for path in paths] == expected


TestAgainstModel = AgainstModel.TestCase
TestAgainstModel.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_forking_shares_the_prompt():
    """Sixteen rollouts take the prompt's pages once; each child starts on a new page, not in the
    prompt's half-filled last one."""
    tree = PrefixTree(num_pages=100, page_size=4)
    prompt = tree.add()
    tree.append(prompt, 6)
    assert tree.slots(prompt, 0, 6) == [0, 1, 2, 3, 4, 5]
    leaves = [tree.add(prompt) for _ in range(16)]
    assert tree.free_pages == 98
    for leaf in leaves:
        tree.append(leaf, 1)
    assert [tree.slots(leaf, 0, 1) for leaf in leaves] == [[8 + 4 * i] for i in range(16)]
    assert [tree.context_length(leaf) for leaf in leaves] == [7] * 16
    tree.release(prompt)
    for leaf in leaves:
        assert tree.free_pages < 100
        tree.release(leaf)
    assert tree.free_pages == 100


def test_page_turns():
    """A page is taken for the first token that does not fit the last one, neither earlier nor
    later."""
    tree = PrefixTree(num_pages=3, page_size=4)
    node = tree.add()
    for length in range(1, 13):
        tree.append(node, 1)
        assert 3 - tree.free_pages == -(-length // 4)
    with pytest.raises(OutOfPages, match="needs 1 pages, the pool has 0 free"):
        tree.append(node, 1)
    assert tree.length(node) == 12
    tree.check_integrity({node: 1})


def test_short_pool_changes_nothing():
    """Guards against a leak: a reservation that fails must not keep pages that it already took."""
    tree = PrefixTree(num_pages=3, page_size=4)
    node = tree.add()
    tree.append(node, 3)
    with pytest.raises(OutOfPages, match="needs 3 pages, the pool has 2 free"):
        tree.append(node, 10)
    assert (tree.free_pages, tree.length(node), tree.pages(node)) == (2, 3, (0,))
    tree.append(node, 9)
    assert tree.slots(node, 3, 12) == [3, 4, 5, 6, 7, 8, 9, 10, 11]


def test_pages_come_in_a_fixed_order():
    """A repeated run gets the same pages: freed ones come back in their former order."""
    tree = PrefixTree(num_pages=6, page_size=1)
    first, second = tree.add(), tree.add()
    tree.append(first, 3)
    tree.append(second, 2)
    tree.release(first)
    third = tree.add()
    tree.append(third, 4)
    assert tree.pages(third) == (0, 1, 2, 5)


@pytest.mark.parametrize(
    "misuse, complaint",
    [
        (lambda tree, node: PrefixTree(0, 64), "must be positive"),
        (lambda tree, node: PrefixTree(4, 0), "must be positive"),
        (lambda tree, node: tree.add(node + 1), "not in the tree"),
        (lambda tree, node: tree.append(node, -1), "cannot take -1"),
        (lambda tree, node: tree.grow([node], 4), "no room for 4"),
        (lambda tree, node: tree.grow([node, node + 1], 4), "no room for 4"),
        (lambda tree, node: tree.truncate(node, 6), "cannot be cut to 6"),
        (lambda tree, node: tree.slots(node, 0, 6), "holds 5 tokens: 0..6 is out of range"),
        (lambda tree, node: tree.slots(node, -1, 2), "holds 5 tokens"),
        (lambda tree, node: tree.depth_first([node, -3]), "node -3 is not"),
    ],
)
def test_misuse(misuse, complaint):
    """A scheduler bug is reported where it happens, and leaves the tree intact."""
    tree = PrefixTree(num_pages=4, page_size=4)
    node = tree.add()
    tree.append(node, 5)
    with pytest.raises(ValueError, match=complaint):
        misuse(tree, node)
    tree.check_integrity({node: 1})


def test_long_chain_is_freed():
    """Freeing does not recurse: a path may be longer than Python's stack."""
    tree = PrefixTree(num_pages=5000, page_size=1)
    node = None
    for _ in range(5000):
        parent, node = node, tree.add(node)
        tree.append(node, 1)
        if parent is not None:
            tree.release(parent)
    assert tree.context_length(node) == 5000
    tree.release(node)
    assert tree.free_pages == 5000
    tree.check_integrity({})


def lines_run(call):
    """Number of Python lines that a call executes: its cost without a clock's noise."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def test_cost_does_not_grow_with_the_tree():
    """With 4,096 rollouts, or below a path of 4,096 nodes, a step's bookkeeping must cost as much
    per rollout as with two."""

    def costs(num_leaves):
        tree = PrefixTree(num_pages=num_leaves * 2 + 4, page_size=64)
        prompt = tree.add()
        tree.append(prompt, 100)
        for _ in range(num_leaves):
            above, prompt = prompt, tree.add(prompt)
            tree.release(above)
        leaves = [tree.add(prompt) for _ in range(num_leaves)]
        for leaf in leaves:
            tree.append(leaf, 61)
        tree.check_integrity({prompt: 1} | dict.fromkeys(leaves, 1))
        calls = [
            lambda: tree.append(leaves[-1], 4),
            lambda: tree.grow(leaves[-1:], 1),
            lambda: tree.context_length(leaves[-1]),
            lambda: tree.add(prompt),
            lambda: tree.release(leaves[0]),
        ]
        return [lines_run(call) for call in calls]

    assert costs(4096) == costs(2)


def small_tree():
    """Root 0: 5 tokens on pages 0, 1; leaves 1 and 2 below it on pages 2 and 3; 4, 5 free."""
    tree = PrefixTree(num_pages=6, page_size=4)
    root = tree.add()
    tree.append(root, 5)
    for _ in range(2):
        tree.append(tree.add(root), 3)
    tree.release(root)
    tree.check_integrity({1: 1, 2: 1})
    return tree


def drop_node(tree, node):
    tree._free += tree._nodes.pop(node).pages


def set_field(node, name, value):
    return lambda tree: setattr(tree._nodes[node], name, value)


def set_tree(name, value):
    return lambda tree: setattr(tree, name, value)


def add_cycle(tree):
    one, other = tree.add(), tree.add()
    tree._nodes[7], tree._nodes[8] = tree._nodes.pop(one), tree._nodes.pop(other)
    for node, parent in ((7, 8), (8, 7)):
        entry = tree._nodes[node]
        entry.parent, entry.holds, entry.children = parent, 0, 1


def keep_parent_first(tree):
    for node in (0, 1, 2):
        tree.set_keepable(node, True)
    for node in (2, 1):
        tree.release(node)
    tree._kept = dict.fromkeys((2, 0, 1))


def release_unnoticed(tree):
    entry = tree._nodes[1]
    entry.holds = entry.users = 0
    tree._nodes[0].users -= 1
    tree._kept[1] = None
    tree._kept_pages += 1


CORRUPTIONS = {
    "page lost from the free list": (lambda t: t._free.remove(4), "page 4 is lost"),
    "page lost from a node": (lambda t: t._nodes[1].pages.clear(), "page 2 is lost"),
    "page owned by two nodes": (
        set_field(2, "pages", [2]),
        "page 2 belongs to node 1 and to node 2",
    ),
    "page owned and free": (lambda t: t._free.append(3), "page 3 belongs to the free list and"),
    "page owned twice": (lambda t: t._nodes[0].pages.append(1), "node 0 and to node 0"),
    "page free twice": (lambda t: t._free.append(5), "the free list and to the free list"),
    "page that does not exist": (lambda t: t._free.append(6), "page 6 .* not in"),
    "negative page": (set_field(1, "pages", [-1]), "page -1 of node 1 is not in"),
    "more tokens than the pages hold": (set_field(1, "length", 5), "node 1: it owns 1 pages"),
    "negative length": (set_field(1, "length", -1), "node 1: it has -1 tokens"),
    "parent grown after the fork": (set_field(0, "length", 6), "node 1: it starts at 5, its"),
    "wrong start": (set_field(2, "start", 4), "node 2: it starts at 4, its ancestors have 5"),
    "root that starts late": (set_field(0, "start", 1), "node 0: it starts at 1"),
    "child not counted": (set_field(0, "children", 1), "node 0: it counts 1 children but has 2"),
    "child counted twice": (set_field(0, "children", 3), "node 0: it counts 3 children but has 2"),
    "child freed unnoticed": (lambda t: drop_node(t, 2), "node 0: it counts 2 children but has 1"),
    "parent freed under its children": (lambda t: drop_node(t, 0), "node 1: its parent 0 is not"),
    "cycle": (set_field(0, "parent", 2), "node 0: it starts at 0, its ancestors"),
    "own parent": (set_field(0, "parent", 0), "node 0: it starts at 0, its ancestors"),
    "empty nodes in a cycle": (add_cycle, r"nodes \[7, 8\] are below no root"),
    "kept without being unused": (
        lambda t: t._kept.update({1: None}),
        r"nodes \[1\] are kept, \[\] have no",
    ),
    "kept pages not counted": (
        set_tree("_kept_pages", 1),
        "kept nodes own 0 pages, 1 are counted",
    ),
    "a parent kept before its child": (keep_parent_first, "node 1 is kept after its parent 0"),
    "keepable below one that is not": (
        set_field(1, "keepable", True),
        "node 1: it is keepable, its parent 0 is not",
    ),
    "user not counted": (set_field(0, "users", 1), "node 0: it counts 1 users but has 2"),
    "released too often": (set_field(1, "holds", -1), "node 1: it has -1 holds"),
    "leaf without a hold": (set_field(1, "holds", 0), "node 1: it counts 1 users but has 0"),
    "leaf without a user": (release_unnoticed, "node 1: it has neither holds nor children"),
    "one hold too many": (lambda t: t.hold(1), "holds per node are"),
    "forgotten hold": (lambda t: t.hold(0), "holds per node are"),
}


@pytest.mark.parametrize("corrupt, finding", CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_check_integrity_finds(corrupt, finding):
    """Guards against an integrity check that overlooks a broken tree."""
    tree = small_tree()
    corrupt(tree)
    with pytest.raises(IntegrityError, match=finding):
        tree.check_integrity({1: 1, 2: 1})
