"""The pages and plans of sequences that share prompts."""

import pytest
import torch

from model.hf.page_tree import PageTree

CPU = torch.device("cpu")


def test_steps_of_a_forked_prompt():
    """Guards pages that two sequences write, slots and positions that are not the next ones, and a
    prompt whose pages are copied: over page boundaries, rebuilt and advanced plans alike."""
    rebuilt, advanced = (PageTree(4, CPU, advances) for advances in (False, True))
    for tree in (rebuilt, advanced):
        tree.append(2, 6)
        tree.fork(3)
    written = {}  # slot -> sequence and position
    for step in range(10):
        for tree in (rebuilt, advanced):
            tree.append(6, 1)
            assert tree.length == 7 + step and tree.sequences == 6
        for name in ("positions", "slots"):
            assert torch.equal(getattr(advanced.step, name), getattr(rebuilt.step, name))
        for name in ("kv_len", "causal_offset", "row_start", "row_end", "pages"):
            plans = advanced.step.plan, rebuilt.step.plan
            assert torch.equal(*(getattr(plan, name) for plan in plans)), name
        assert rebuilt.step.positions.tolist() == [6 + step] * 6
        for row, slot in enumerate(rebuilt.step.slots.tolist()):
            assert slot not in written and slot >= 4 * 4  # the prompts have four pages
            written[slot] = row, step
    assert advanced.step.plan.advanced == 1  # of ten steps, every fourth has a new plan
    nodes = rebuilt.step.plan.nodes
    assert [node.kv_len for node in nodes] == [6, 10, 10, 10] * 2
    assert [(node.row_start, node.row_end) for node in nodes[::4]] == [(0, 3), (3, 6)]
    assert rebuilt.num_pages < 2 * (2 * 2 + 6 * 3)


def test_forks():
    """Guards a fork of what has no tokens yet, of nothing, and of forks."""
    tree = PageTree(4, CPU, advances=True)
    tree.fork(3)
    assert (tree.sequences, tree.length) == (0, 0)
    tree.append(1, 5)
    for count in (2, 1, 2):
        tree.fork(count)
    tree.append(4, 2)
    tree.fork(2)
    tree.append(8, 1)
    assert [node.kv_len for node in tree.step.plan.nodes] == [5, *[2, 1, 1] * 4]
    assert tree.step.positions.tolist() == [7] * 8


def test_chunks_of_a_prompt():
    """Guards the slots of a step that begins within a page, and of several sequences."""
    tree = PageTree(4, CPU, advances=True)
    tree.append(2, 3)
    tree.append(2, 3)
    assert tree.step.slots.tolist() == [3, 8, 9, 7, 12, 13]
    assert tree.step.positions.tolist() == [3, 4, 5] * 2
    assert [node.num_new for node in tree.step.plan.nodes] == [3, 3]


def test_refusals():
    tree = PageTree(4, CPU, advances=True)
    with pytest.raises(ValueError, match="a step begins at layer 0"):
        _ = tree.step
    tree.append(2, 3)
    with pytest.raises(ValueError, match=r"has 2 sequences, the input has 6 rows: batch_repeat"):
        tree.append(6, 1)
    tree.clear()
    tree.append(6, 1)
    assert (tree.sequences, tree.length) == (6, 1)
