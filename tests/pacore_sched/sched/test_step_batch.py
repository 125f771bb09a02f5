"""A step's batch compared with brute force: what each row sees through the plan, slot by slot."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.prefix_plan import PrefixPlan
from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.step_batch import build_step_batch

NUM_PAGES = 400


@st.composite
def steps(draw):
    """A tree after some steps, the work of the next one, and the history of every node.

    Old nodes are written first. Then some leaves grow, and new nodes are added below any node and
    written completely: everything that a step may do. `history` maps a node to the slots of its
    tokens, as `slots` returned them.
    """
    tree = PrefixTree(NUM_PAGES, draw(st.integers(1, 5)))
    history, parents = {}, {}

    def append(node, tokens):
        tree.append(node, tokens)
        tree.reserve(node, draw(st.integers(0, 2)))  # reserved pages change nothing
        history[node] = tree.slots(node, 0, tree.length(node))

    def add(tokens):
        parent = draw(st.sampled_from([None, *history]))
        node = tree.add(parent)
        parents[node] = parent
        append(node, tokens)
        return node

    for _ in range(draw(st.integers(0, 8))):
        add(draw(st.integers(0, 12)))
    work = []
    for node in sorted(set(history) - set(parents.values())):
        if draw(st.booleans()):
            work.append((node, draw(st.integers(1, 7))))
            append(*work[-1])
    for _ in range(draw(st.integers(0, 6))):
        tokens = draw(st.integers(0, 7))
        node = add(tokens)
        if tokens:
            work.append((node, tokens))
    return tree, draw(st.permutations(work)), history


def build(tree, batch):
    return PrefixPlan.build(
        batch.plan_nodes,
        num_rows=len(batch.positions),
        num_pages=tree.num_pages,
        page_size=tree.page_size,
    )


def visible_slots(tree, batch, row):
    """Slots that a row attends to, computed from the plan as kernels/prefix_plan.py defines it."""
    plan = build(tree, batch)
    size, slots = tree.page_size, []
    for index in range(len(batch.plan_nodes)):
        start, end = int(plan.row_start[index]), int(plan.row_end[index])
        if not start <= row < end:
            continue
        pages = plan.pages[plan.page_start[index] : plan.page_start[index + 1]].tolist()
        causal = int(plan.causal_offset[index]) + (row - start) + 1
        for token in range(min(int(plan.kv_len[index]), causal)):
            slots.append(pages[token // size] * size + token % size)
    return slots


@settings(max_examples=80, derandomize=True, deadline=None)
@given(steps())
def test_every_row_sees_its_own_history(step):
    """Each row sees every token of its sequence up to and including itself once, and none of
    another sequence; its K and V are written where later rows look for them."""
    tree, work, history = step
    batch = build_step_batch(tree, work)
    assert sorted(batch.work) == sorted(work)
    row = 0
    for item, (node, num_new) in enumerate(batch.work):
        before = [slot for above in tree.path(node)[:-1] for slot in history[above]]
        for token in range(len(history[node]) - num_new, len(history[node])):
            sequence = before + history[node][: token + 1]
            assert sorted(visible_slots(tree, batch, row)) == sorted(sequence)
            assert batch.positions[row] == len(sequence) - 1
            assert batch.slots[row] == sequence[-1]
            row += 1
        assert batch.last_rows[item] == row - 1
    assert row == len(batch.positions) == len(batch.slots) == len(set(batch.slots))


@settings(max_examples=80, derandomize=True, deadline=None)
@given(steps())
def test_ranges_are_those_of_a_tree(step):
    """Every node with tokens on a path of the work is in the plan once, parents before children,
    with the contiguous rows of the work at and below it, its own first."""
    tree, work, _ = step
    batch = build_step_batch(tree, work)
    on_paths = {n for node, _ in work for n in tree.path(node) if tree.length(n)}
    listed = [path[-1] for path in tree.depth_first(on_paths)]
    assert [node.pages for node in batch.plan_nodes] == [tree.pages(node) for node in listed]
    owner = [node for node, num_new in batch.work for _ in range(num_new)]
    for node, entry in zip(listed, batch.plan_nodes, strict=True):
        rows = [row for row, item in enumerate(owner) if node in tree.path(item)]
        assert rows == list(range(entry.row_start, entry.row_end))
        assert owner[entry.row_start :][: entry.num_new] == [node] * entry.num_new
        assert entry.num_new == dict(work).get(node, 0)
    for upper, lower in pairwise(batch.plan_nodes):
        assert lower.row_start >= upper.row_end or lower.row_end <= upper.row_end


@settings(max_examples=40, derandomize=True, deadline=None)
@given(steps())
def test_order_of_work_does_not_matter(step):
    """The batch depends only on the tree and the set of work, so a run is reproducible."""
    tree, work, _ = step
    assert build_step_batch(tree, work) == build_step_batch(tree, sorted(work))


def prompt_with_leaves():
    """Prompt 0 of 5 tokens and leaves 1 and 2 of 3 tokens each."""
    tree = PrefixTree(num_pages=16, page_size=4)
    tree.append(tree.add(), 5)
    for _ in range(2):
        tree.append(tree.add(0), 3)
    return tree


def test_decode_step_by_hand():
    """The common case, by hand: two rollouts decode one token each over one prompt."""
    tree = prompt_with_leaves()
    batch = build_step_batch(tree, [(2, 1), (1, 1)])
    assert batch.work == ((1, 1), (2, 1))
    assert batch.positions == (7, 7)
    assert batch.slots == (2 * 4 + 2, 3 * 4 + 2)
    assert batch.last_rows == (0, 1)
    ranges = [(n.pages, n.kv_len, n.row_start, n.row_end, n.num_new) for n in batch.plan_nodes]
    assert ranges == [((0, 1), 5, 0, 2, 0), ((2,), 3, 0, 1, 1), ((3,), 3, 1, 2, 1)]


def test_prompt_and_rollouts_in_one_step():
    """A prompt's last chunk and the first tokens of its rollouts may share a step: the rollouts'
    rows follow the prompt's and see all of it."""
    tree = prompt_with_leaves()
    batch = build_step_batch(tree, [(1, 3), (0, 2), (2, 3)])
    assert batch.work == ((0, 2), (1, 3), (2, 3))
    assert batch.positions == (3, 4, 5, 6, 7, 5, 6, 7)
    assert [len(visible_slots(tree, batch, row)) for row in range(8)] == [4, 5, 6, 7, 8, 6, 7, 8]


def test_plan_is_not_changed_by_later_steps():
    """A batch in flight must keep its pages while the scheduler already grows the tree."""
    tree = prompt_with_leaves()
    batch = build_step_batch(tree, [(1, 1)])
    pages = [tuple(node.pages) for node in batch.plan_nodes]
    tree.append(1, 9)
    assert [tuple(node.pages) for node in batch.plan_nodes] == pages


def test_empty_step():
    """A step without work has no rows, and no plan nodes."""
    batch = build_step_batch(prompt_with_leaves(), [])
    assert (batch.work, batch.plan_nodes, batch.positions, batch.last_rows) == ((), (), (), ())


@pytest.mark.parametrize(
    "work, complaint",
    [
        ([(1, 1), (2, 1), (1, 1)], "listed twice"),
        ([(1, 1), (1, 2)], "listed twice"),
        ([(1, 0)], "0 of them cannot be new"),
        ([(1, -1)], "-1 of them cannot be new"),
        ([(1, 4)], "holds 3 tokens: 4 of them cannot be new"),
        ([(7, 1)], "node 7 is not in the tree"),
        ([(0, 1), (1, 2)], "node 1 holds tokens of earlier steps, but node 0"),
        ([(1, 2), (0, 5)], "node 1 holds tokens of earlier steps, but node 0"),
    ],
)
def test_invalid_work_is_refused(work, complaint):
    """A step that would compute wrong KV is refused: a child's tokens that were written before its
    parent's did not see them."""
    with pytest.raises(ValueError, match=complaint):
        build_step_batch(prompt_with_leaves(), work)


def test_older_tokens_between_two_written_nodes():
    """The rule applies along the whole path: a middle node that is not written in this step has
    tokens that did not see the root's new ones."""
    tree = prompt_with_leaves()
    below = tree.add(1)
    tree.append(below, 2)
    with pytest.raises(ValueError, match="node 1 holds tokens of earlier steps, but node 0"):
        build_step_batch(tree, [(0, 1), (below, 2)])
    build_step_batch(tree, [(0, 1), (1, 3), (below, 2)])


def test_empty_node_between_two_written_nodes():
    """An empty node has no outdated tokens, and must not hide outdated ones below it."""
    tree = PrefixTree(num_pages=16, page_size=4)
    root = tree.add()
    tree.append(root, 5)
    leaf = tree.add(tree.add(root))
    tree.append(leaf, 3)
    assert len(build_step_batch(tree, [(root, 1), (leaf, 3)]).plan_nodes) == 2
    with pytest.raises(ValueError, match=f"node {leaf} holds tokens of earlier steps"):
        build_step_batch(tree, [(root, 1), (leaf, 1)])
