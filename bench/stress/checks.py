"""What must hold after every event of a stress run, counted without the engine's help."""

from collections.abc import Iterator

from bench.stress.driver import Run
from bench.stress.hash_executor import expect, owners_of
from kernels.runtime.arithmetic import cdiv
from pacore_sched.engine.engine import EngineStats
from pacore_sched.sched.policy import ReserveMax
from pacore_sched.sched.prompts import Counts
from pacore_sched.sched.request import Group, Rollout, Segment

IDLE_STEPS = 3  # one to collect a step, one to preempt


class Checks:
    """The state of a run that checks compare with: what the engine has done so far."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.groups: list[Group] = []
        self.dropped = 0  # segments' tokens whose KV was dropped although they are still needed
        self._written: dict[Segment, int] = {}

    def after_event(self) -> None:
        """Raise AssertionError for the first thing that is wrong."""
        run, engine = self.run, self.run.engine
        engine.scheduler.check_integrity()
        self.groups += [group for group in run.live if group.number >= len(self.groups)]
        self._pages()
        self._rollouts()
        self._segments()
        self._counts(engine.stats, engine.scheduler.counts)
        expect(run.idle_steps <= IDLE_STEPS, "a group could go on, but nothing happens")

    def at_end(self) -> None:
        """The same when everything has ended and all KV has been dropped."""
        run, scheduler = self.run, self.run.engine.scheduler
        expect(not run.live and not scheduler.groups and not scheduler.running, "groups are left")
        expect(scheduler.tree.free_pages == run.config.num_pages, "pages are left")
        expect(scheduler.host_pages == run.config.host_pages, "pages are left on the host")
        held = {item for item in contents(run.engine, {id(run.executor)})
                if isinstance(item, Rollout | Group | Segment)}  # fmt: skip
        last = run.executor.last_batch
        known = owners_of(last) | {rollout for rollout, _ in last.evicted}
        expect(held <= known, "ended rollouts or groups are not freed")

    def _pages(self) -> None:
        """Each page is free, or owned by one node that is in use."""
        run, tree = self.run, self.run.engine.scheduler.tree
        segments = {s for live in run.live.values() for s in live.group.path} | {*run.kept}
        used = [segment.node for segment in segments if segment.node >= 0]
        used += [rollout.node for rollout in run.engine.scheduler.running]
        owned = [page for node in {n for leaf in used for n in tree.path(leaf)}
                 for page in tree.pages(node)]  # fmt: skip
        expect(len({*owned}) == len(owned), "a page belongs to two nodes")
        expect(len(owned) + tree.free_pages == run.config.num_pages, "pages are lost")

    def _rollouts(self) -> None:
        """Running, waiting and ended rollouts are those of the groups that are not done."""
        run, scheduler = self.run, self.run.engine.scheduler
        expect(scheduler.groups.keys() == run.live.keys(), "the scheduler has other groups")
        running = scheduler.running
        expect(len(running) <= run.config.max_running, "too many rollouts run")
        indices = {rollout.batch_index for rollout in running}
        expect(len(indices) == len(running), "two rollouts have one batch index")
        expect(
            all(0 <= index < run.config.max_running for index in indices), "a batch index is wrong"
        )
        for live in run.live.values():
            waiting = live.group.waiting
            states = {*waiting} | {r for r in running if r.group is live.group}
            expect(states == live.expected.keys(), "a rollout neither waits nor runs")
            for rollout in live.expected:
                count = len(rollout.tokens)
                expect(count <= rollout.scheduled <= rollout.max_tokens, "tokens in flight")
                expect(rollout.tokens == live.expected[rollout].tokens[:count], "wrong tokens")
        expect({r.group for r in running} <= run.live.keys(), "an unknown rollout runs")
        for rollout in running:
            self._node(rollout)
        size, copies = run.config.page_size, self.run.executor.host
        on_host = sum(len(copy) // size for r, copy in copies.items() if not r.finish_reason)
        expect(on_host <= run.config.host_pages, "too many pages on the host")

    def _node(self, rollout: Rollout) -> None:
        """A running rollout is below its whole prompt, with pages for a few tokens more."""
        tree, path = self.run.engine.scheduler.tree, rollout.group.path
        nodes = [*(segment.node for segment in path), rollout.node]
        above = [node for node in tree.path(rollout.node) if node in nodes]
        expect(above == nodes, "a rollout is not below its prompt")
        prompt = sum(segment.tokens for segment in path)
        own = tree.length(rollout.node)
        expect(tree.context_length(rollout.node) == prompt + own, "tokens above a rollout")
        expect(all(s.written == s.tokens for s in path), "a rollout runs before its prompt")
        size, known = self.run.config.page_size, 1 + rollout.scheduled
        spare = len(tree.pages(rollout.node)) * size - max(known, tree.length(rollout.node))
        expect(spare < 2 * size, "a rollout has pages that it does not need soon")

    def _segments(self) -> None:
        """Segments have their users and pages; counts those that lose their KV although needed."""
        size = self.run.config.page_size
        needed = {s for group in self.run.live for s in group.path} | {*self.run.kept}
        for segment in needed:
            users = sum(segment in group.path for group in self.run.live)
            expect(segment.users == users + self.run.kept.count(segment), "users of a segment")
            pages, written = self._pages_of(segment), segment.written
            expect(cdiv(written, size) <= pages <= cdiv(segment.tokens, size), "pages of a segment")
        for segment, written in self._written.items():
            if segment in needed and segment.written < written:
                self.dropped += written
                self.run.happened["segments dropped"] += 1
        self._written = {segment: segment.written for segment in needed}

    def _pages_of(self, segment: Segment) -> int:
        """Pages of all nodes with tokens of a segment."""
        if segment.node < 0:
            return 0
        tree = self.run.engine.scheduler.tree
        start = tree.context_length(segment.node) - segment.written
        path = tree.path(segment.node)
        nodes = [n for n in path if tree.context_length(n) - tree.length(n) >= start]
        return sum(len(tree.pages(node)) for node in nodes)

    def _counts(self, stats: EngineStats, counts: Counts) -> None:
        """The engine's counters are those of the executor and of the rollouts."""
        seen, rollouts = self.run.executor.counts, [r for g in self.groups for r in g.rollouts]
        for field in ("steps", "kv_read", "kv_read_unshared"):
            expect(getattr(stats, field) == seen[field], f"stats.{field}")
        generated = sum(len(rollout.tokens) for rollout in rollouts)
        expect(stats.generated == generated, "stats.generated")
        errors = sum(rollout.finish_reason == "error" for rollout in rollouts)
        expect(stats.generated + stats.wasted + errors == seen["sampled"], "stats.wasted")
        expect(stats.accepted <= stats.drafted <= seen["drafted"], "stats.drafted")
        expect(counts.prefilled == seen["segment rows"], "counts.prefilled")
        expect(counts.prefix_hits == seen["prefix_hits"], "counts.prefix_hits")
        preemptions = sum(rollout.preemptions for rollout in rollouts)
        expect(counts.preemptions == preemptions, "counts.preemptions")
        cancelled = sum(r.scheduled for r in rollouts if r.finish_reason == "cancelled")
        expect(counts.cancelled == cancelled, "counts.cancelled")
        expect(counts.recomputed >= self.dropped - counts.found, "counts.recomputed")
        if isinstance(self.run.engine.scheduler.policy, ReserveMax):
            expect(not preemptions, "reserve-max has preempted")


def contents(item: object, seen: set[int]) -> Iterator[object]:
    """Everything that an object's containers hold, each once; what rollouts and segments hold is
    left out."""
    if id(item) in seen:
        return
    seen.add(id(item))
    yield item
    if isinstance(item, Rollout | Group | Segment | str | bytes | int | float):
        return
    if isinstance(item, dict):
        inner = [*item.keys(), *item.values()]
    elif isinstance(item, list | tuple | set | frozenset):
        inner = [*item]
    elif type(item).__module__.startswith(("pacore_sched", "bench.stress")):
        slots = getattr(type(item), "__slots__", ())
        inner = [*getattr(item, "__dict__", {}).values(), *(getattr(item, s) for s in slots)]
    else:
        return
    for other in inner:
        yield from contents(other, seen)
