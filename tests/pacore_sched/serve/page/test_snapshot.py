"""Snapshots of the engine: its own numbers, in a bounded size."""

from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import TypeVar

import pytest
from pydantic import TypeAdapter

from pacore_sched.answers.problem_run import Settings
from pacore_sched.engine.engine import Engine
from pacore_sched.sched.policy import LaterRoundFirst
from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.request import Group, Rollout, Sampling, Segment
from pacore_sched.sched.scheduler import Scheduler
from pacore_sched.serve.page import tree
from pacore_sched.serve.page.snapshot import Snapshot, take_snapshot
from pacore_sched.serve.page.tree import read_tree
from tests.pacore_sched.serve.serving import Running, client, endless, running, scripted, wait_for

T = TypeVar("T")


def between_steps(server: Running, function: Callable[[], T]) -> T:
    """What a function returns in the engine's thread."""
    done: Future[T] = Future()
    server.service.thread.post(lambda: done.set_result(function()))
    return done.result(20)


def check(snapshot: Snapshot, engine: Engine) -> None:
    """Compare a snapshot with what the engine's own methods say of the same moment."""
    scheduler, tree = engine.scheduler, engine.scheduler.tree
    running = list(scheduler.running)
    assert (snapshot.tokens, snapshot.steps) == (engine.stats.generated, engine.stats.steps)
    assert snapshot.running == len(running)
    kv = snapshot.kv
    assert (kv.total, kv.free, kv.page_tokens) == (tree.num_pages, tree.free_pages, tree.page_size)
    assert kv.prompts + kv.rollouts + kv.kept + kv.free == kv.total
    assert kv.rollouts == sum(len(tree.pages(rollout.node)) for rollout in running)
    seen: set[int] = set()
    for node in snapshot.nodes:
        assert node.parent is None or node.parent in seen
        seen.add(node.id)
        assert tree.path(node.id)[-2:] == tuple(n for n in (node.parent, node.id) if n is not None)
        assert node.start + node.tokens == tree.context_length(node.id)
        assert (node.tokens, node.pages) == (tree.length(node.id), len(tree.pages(node.id)))
        readers = [rollout for rollout in running if node.id in tree.path(rollout.node)]
        assert node.running == len(readers)
        assert (node.state == "running") == bool(readers)
        below = [tree.length(r.node) for r in readers if tree.path(r.node)[-2] == node.id]
        assert node.branches == below


def script(rollout: Rollout) -> str:
    """The first rollout of the first request ends soon; no other one does."""
    first = rollout.group.problem == 1 and rollout.index == 0
    return "</think>short" if first else endless(rollout)


def test_numbers():
    """Those of the engine, with rollouts that run, wait and have ended, and nodes that are kept."""
    service = scripted(script, max_running=5)
    with running(service) as server:
        engine = service.engine
        tree = engine.scheduler.tree
        assert between_steps(server, lambda: take_snapshot(engine, [])).nodes == []
        with client(server, pacore={"widths": [4]}, max_tokens=3000):
            wait_for(lambda: len(engine.scheduler.running) == 3, "a rollout that has ended")
            with client(server, n=3, max_tokens=3000):
                wait_for(lambda: len(engine.scheduler.running) == 5, "the second request")
                root, child = between_steps(server, lambda: keep(tree))

                def checked() -> Snapshot:
                    snapshot = take_snapshot(engine, service.thread.jobs)
                    check(snapshot, engine)
                    return snapshot

                snapshot = between_steps(server, checked)
        between_steps(server, lambda: (tree.release(child), tree.release(root)))
        server.wait_idle()
    first, second = snapshot.problems
    assert (first.number, first.round, first.widths, first.synthesis) == (1, 0, [4, 1], True)
    assert (first.running, first.waiting, first.ended) == (3, 0, 1)
    assert [rollout.state for rollout in first.rollouts] == ["ended"] + ["running"] * 3
    assert first.rollouts[0].tokens == len("</think>short") + 1
    assert first.tokens == sum(rollout.tokens for rollout in first.rollouts)
    assert (second.number, second.widths, second.synthesis) == (2, [3], False)
    assert (second.running, second.waiting, second.ended) == (2, 1, 0)
    assert (snapshot.waiting, snapshot.kv.kept) == (1, 3)
    states = {node.id: (node.state, node.problems, node.running) for node in snapshot.nodes}
    assert states.pop(root) == states.pop(child) == ("kept", [], 0)
    assert sorted(states.values()) == [("running", [1], 3), ("running", [2], 2)]


def keep(tree: PrefixTree) -> tuple[int, int]:
    """A node and its child that no request reads: 3 pages."""
    root = tree.add()
    tree.append(root, 2 * tree.page_size)
    child = tree.add(root)
    tree.append(child, 1)
    return root, child


def test_later_round():
    """The tokens of earlier rounds count; the synthesis is the last round."""
    service = scripted(lambda r: "</think>short" if r.group.round == 0 else endless(r))
    with running(service) as server:
        with client(server, pacore={"widths": [2]}, max_tokens=2000):
            engine, thread = service.engine, service.thread
            wait_for(lambda: any(group.round for group in engine.scheduler.groups), "round 1")
            snapshot = between_steps(server, lambda: take_snapshot(engine, thread.jobs))
        server.wait_idle()
    (problem,) = snapshot.problems
    assert (problem.round, len(problem.rollouts)) == (1, 1)
    assert problem.tokens == 2 * (len("</think>short") + 1) + problem.rollouts[0].tokens


def test_limits():
    """Thousands of rollouts, requests and nodes: what is left out is counted, and what is shown
    fits 64 KiB."""
    scheduler = Scheduler(20_000, 4, LaterRoundFirst(), max_running=4096, token_budget=8192)
    jobs = []
    for number in range(100):
        group = Group([Segment(8)], 0, Sampling(100), problem=number, need=50)
        group.rollouts += [Rollout(group, index, 0, 100) for index in range(50)]
        scheduler.submit(group)
        run = SimpleNamespace(
            group=group, rounds=[], settings=Settings([50], Sampling()), number=number
        )
        jobs.append(SimpleNamespace(run=run, arrived=0.0))
    while len(scheduler.running) < 4096:
        scheduler.schedule()
    for _ in range(1000):
        keep(scheduler.tree)
    stats = SimpleNamespace(generated=10**9, steps=10**6)
    snapshot = take_snapshot(SimpleNamespace(scheduler=scheduler, stats=stats), jobs)
    assert snapshot.running == 4096 and snapshot.waiting == 5000 - 4096
    assert (len(snapshot.problems), snapshot.problems_left_out) == (24, 100 - 24)
    assert len(snapshot.nodes) == 64
    read = {segment.node for group in scheduler.groups for segment in group.path} - {-1}
    assert snapshot.nodes_left_out == len(read) + 2000 - 64
    for problem in snapshot.problems:
        assert (len(problem.rollouts), problem.rollouts_left_out) == (32, 50 - 32)
    for node in snapshot.nodes:
        assert (len(node.branches), node.branches_left_out) == (16, 50 - 16)
    assert len(TypeAdapter(Snapshot).dump_json(snapshot)) < 1 << 16


def test_readers_are_limited(monkeypatch: pytest.MonkeyPatch):
    """A node that many requests read, of whose rollouts those below a child are not its branches;
    and a node with many rollouts that is left out because it is new."""
    scheduler = Scheduler(1000, 4, LaterRoundFirst(), max_running=64)
    system = Segment(8)
    for number in range(10):
        width = 5 if number == 9 else 2
        group = Group([system, Segment(3)], 0, Sampling(), problem=number, need=width)
        group.rollouts += [Rollout(group, index, 0, 5) for index in range(width)]
        scheduler.submit(group)
    while len(scheduler.running) < 23:
        scheduler.schedule()
    _, nodes, _ = read_tree(scheduler)
    shared, *others = nodes
    assert (shared.problems, shared.problems_left_out) == ([0, 1, 2, 3], 6)
    assert (shared.running, shared.branches) == (23, [])
    assert {node.parent for node in others} == {shared.id}
    assert [node.running for node in others] == [5] + [2] * 9
    monkeypatch.setattr(tree, "MAX_NODES", 2)
    assert read_tree(scheduler)[1:] == ([shared, others[0]], 9)
