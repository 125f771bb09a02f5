"""Invariants of the scheduler over random traces, with an executor that only counts."""

import gc
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pacore_sched.sched.policy import ORACLES, POLICIES, LaterRoundFirst
from pacore_sched.sched.request import Batch, Group, Rollout, Sampling, Segment
from pacore_sched.sched.scheduler import MIN_ENDS, Scheduler

PAGE = 4


class Trace:
    """Drives a scheduler as an engine does, checks every batch, and records everything.

    `written[node]` counts the tokens whose KV an executor would have written, in order.
    """

    def __init__(self, scheduler: Scheduler, lengths: dict[Rollout, int]) -> None:
        self.scheduler, self.lengths = scheduler, lengths
        self.written, self.tokens, self.ended = Counter(), Counter(), []
        self.steps, self.batches = 0, []
        self.host_pages, self.on_host = scheduler.host_pages, {}  # rollout -> pages

    def step(self) -> bool:
        """Run one step; False if there was nothing to do."""
        scheduler = self.scheduler
        batch = scheduler.schedule()
        scheduler.check_integrity()
        if batch is None:
            return False
        self.steps += 1
        self.batches.append(batch)
        self.execute(batch)
        for rollout in batch.sampled:
            if rollout.finish_reason:
                continue  # cancelled by a sibling's end in this very step
            self.tokens[rollout] += 1
            assert self.tokens[rollout] == rollout.scheduled
            if self.tokens[rollout] == self.lengths[rollout]:
                self.ended += [rollout, *scheduler.finish(rollout, "stop")]
                scheduler.check_integrity()
        return True

    def execute(self, batch: Batch) -> None:
        """Check that each token of a node is written exactly once, in order, after all its
        ancestors."""
        tree, rows = self.scheduler.tree, len(batch.decode)
        self.on_host |= {rollout: len(pages) for rollout, pages in batch.evicted}
        self.on_host = {r: pages for r, pages in self.on_host.items() if not r.finish_reason}
        assert sum(self.on_host.values()) <= self.host_pages
        new = {chunk.owner: chunk.stop - chunk.start for chunk in batch.chunks}
        for rollout, pages in batch.restored:
            assert len(pages) == self.on_host.pop(rollout)
            self.written[rollout.node] = tree.length(rollout.node) - new.get(rollout, 1)
            assert -(-self.written[rollout.node] // PAGE) == len(pages)
        for chunk in batch.chunks:
            rows += chunk.stop - chunk.start
            assert chunk.stop > chunk.start == self.written[chunk.owner.node]
            self.written[chunk.owner.node] = chunk.stop
            if chunk.samples:
                assert chunk.stop == 1 + self.tokens[chunk.owner]
        for rollout in batch.decode:
            assert self.written[rollout.node] == self.tokens[rollout]
            self.written[rollout.node] += 1
        for rollout in batch.sampled:
            *above, leaf = tree.path(rollout.node)
            assert [tree.length(n) for n in above] == [s.tokens for s in rollout.group.path]
            for node in (*above, leaf):
                assert self.written[node] == tree.length(node)
        assert 0 < rows <= self.scheduler.token_budget
        assert len(self.scheduler.running) <= self.scheduler.max_running
        assert len(set(batch.sampled)) == len(batch.sampled)
        assert len({rollout.batch_index for rollout in self.scheduler.running}) == len(
            self.scheduler.running
        )

    def run(self, max_steps: int = 100_000) -> None:
        while self.step():
            assert self.steps < max_steps, "no end"


def group_of(
    lengths: list[int],
    prompt: tuple[Segment, ...] = (),
    *,
    problem: int = 0,
    round_: int = 0,
    need: int | None = None,
    slack: int = 0,
) -> tuple[Group, dict[Rollout, int]]:
    group = Group(prompt, 1, Sampling(), problem=problem, round=round_, need=need or len(lengths))
    group.rollouts = [Rollout(group, i, i, length + slack) for i, length in enumerate(lengths)]
    return group, dict(zip(group.rollouts, lengths, strict=True))


def find_policy(name: str, lengths: dict[Rollout, int]) -> LaterRoundFirst:
    args = (lengths.__getitem__,) if name in ORACLES else ()
    return POLICIES[name](*args)


@st.composite
def traces(draw):
    """A scheduler short of pages, and groups that arrive while it runs."""
    num_pages = draw(st.integers(6, 40))
    max_length = num_pages * PAGE // 3
    groups, lengths = [], {}
    for problem in range(draw(st.integers(1, 6))):
        head = Segment(draw(st.integers(1, max_length)))
        shared = (head,) if draw(st.booleans()) else ()
        for round_ in range(draw(st.integers(1, 2))):
            prompt = (
                *shared,
                *(Segment(draw(st.integers(1, 8))) for _ in range(draw(st.integers(0, 1)))),
            )
            wanted = draw(st.lists(st.integers(1, max_length), min_size=1, max_size=6))
            need = draw(st.integers(1, len(wanted)))
            group, group_lengths = group_of(
                wanted,
                prompt,
                problem=problem,
                round_=round_,
                need=need,
                slack=draw(st.integers(0, 3)),
            )
            groups.append((draw(st.integers(0, 60)), group))
            lengths |= group_lengths
    max_running = draw(st.integers(1, 8))
    scheduler = Scheduler(
        num_pages,
        PAGE,
        find_policy(draw(st.sampled_from(sorted(POLICIES))), lengths),
        max_running=max_running,
        token_budget=draw(st.integers(max_running, 24)),
        host_pages=draw(st.sampled_from([0, 0, 5, 100])),
    )
    return scheduler, groups, lengths


@settings(max_examples=300, derandomize=True, deadline=None)
@given(traces())
def test_random_traces(trace):
    """Every rollout ends once, within its max_tokens, having written each of its tokens in order;
    no page is lost or owned twice at any step; and every trace ends."""
    scheduler, groups, lengths = trace

    def fits(group: Group) -> bool:
        longest = max(rollout.max_tokens for rollout in group.rollouts)
        return scheduler.max_pages(group.path, longest) <= scheduler.tree.num_pages

    fitting = [(at, group) for at, group in groups if fits(group)]
    for _, group in groups:
        if not fits(group):
            with pytest.raises(ValueError, match="the group needs"):
                scheduler.submit(group)
    run = Trace(scheduler, lengths)
    pending = sorted(fitting, key=lambda entry: entry[0])
    while True:
        while pending and (pending[0][0] <= run.steps or not scheduler.groups):
            scheduler.submit(pending.pop(0)[1])
        if not run.step():
            assert not scheduler.groups, "groups wait, but there is nothing to do"
            if not pending:
                break
        assert run.steps < 20_000
    assert Counter(run.ended) == Counter(r for _, group in fitting for r in group.rollouts)
    for _, group in fitting:
        complete = [r for r in group.rollouts if r.finish_reason == "stop"]
        assert len(complete) == group.need == group.ended
        assert all(run.tokens[rollout] == lengths[rollout] for rollout in complete)
    assert scheduler.tree.free_pages == scheduler.tree.num_pages
    assert scheduler.host_pages == run.host_pages
    assert scheduler.counts.cancelled == sum(
        r.scheduled
        for _, group in fitting
        for r in group.rollouts
        if r.finish_reason == "cancelled"
    )


def test_no_rollout_restarts_in_the_step_that_preempted_it():
    """Two rollouts are preempted, and the second's pages would suffice for the first to restart. It
    must not: its last token may still be in flight, and its entry in the executor's table is gone.
    """

    class LeastFirst(LaterRoundFirst):
        def victim(self, running):
            return min(running, key=lambda rollout: rollout.scheduled)

    scheduler = Scheduler(41, PAGE, LeastFirst(watermark=0.0), max_running=8, token_budget=16)
    old, lengths = group_of([99] * 5, problem=1)
    late, more = group_of([99], problem=0)
    scheduler.submit(old)
    run = Trace(scheduler, lengths | more)
    for step in range(32):
        if step == 28:
            scheduler.submit(late)
        run.step()
    assert scheduler.counts.preemptions == 0 and scheduler.tree.free_pages == 0
    run.step()
    assert scheduler.counts.preemptions == 2
    assert scheduler.tree.free_pages >= 2  # what the first victim would need
    assert len(run.batches[-1].decode) == 4 and not run.batches[-1].chunks
    run.run()


def long_batches() -> tuple[Scheduler, Trace, Segment]:
    """A rollout whose pages last for 64 steps, and a kept prompt of 4 pages; 3 pages are free."""
    scheduler = Scheduler(8, 64, LaterRoundFirst(watermark=0.0), max_running=8)
    first, lengths = group_of([1], (Segment(4 * 64),))
    running, more = group_of([64])
    scheduler.keep(first.path[0])
    run = Trace(scheduler, lengths | more)
    for group in (first, running):
        scheduler.submit(group)
        run.step()
        run.step()
    assert scheduler.tree.free_pages == 3 and run.batches[-1].steps > 1
    return scheduler, run, first.path[0]


def test_pages_of_a_dropped_prompt_are_used_at_once():
    """A group that waits for pages must start in the step after they are freed, not at the end of a
    batch that could repeat for a page's worth of steps."""
    scheduler, run, kept = long_batches()
    waiting, _ = group_of([9], (Segment(3 * 64),))
    scheduler.submit(waiting)
    for _ in range(3):
        run.step()
    assert waiting.path[0].node < 0 and run.batches[-1].steps > 1
    scheduler.drop(kept)
    run.step()
    assert waiting.path[0].written


def test_cancelling_a_group_unblocks_the_queue_at_once():
    """A group that needs more pages than are free blocks the groups after it; once it is cancelled,
    they must start in the next step."""
    scheduler, run, _ = long_batches()
    large, small = group_of([9], (Segment(6 * 64),))[0], group_of([9])[0]
    for group in (large, small):
        scheduler.submit(group)
    for _ in range(3):
        run.step()
    assert all(rollout.node < 0 for rollout in small.rollouts) and run.batches[-1].steps > 1
    scheduler.cancel(large)
    run.lengths |= {small.rollouts[0]: 9}
    run.step()
    assert small.rollouts[0] in scheduler.running


def test_no_step_writes_more_than_max_tokens():
    """A rollout whose tokens are all scheduled leaves the batch, even if no one has read its last
    ones yet."""
    scheduler = Scheduler(20, 64, LaterRoundFirst(), max_running=8)
    group, _ = group_of([5, 9])
    scheduler.submit(group)
    batches = [scheduler.schedule() for _ in range(12)]
    short, long = group.rollouts
    assert [short in batch.decode for batch in batches if batch] == [True] * 5 + [False] * 4
    assert (short.scheduled, long.scheduled) == (5, 9) and batches[9:] == [None] * 3


def test_late_images_are_written_while_others_decode():
    """While a prompt waits for its images, batches must not promise to repeat, and the prompt is
    written in the step after the images are ready."""
    scheduler = Scheduler(20, 64, LaterRoundFirst(), max_running=8)
    encoded = False
    late = Segment(9, ready=lambda: encoded)
    for path in ((), (late,)):
        group, _ = group_of([50], path)
        scheduler.submit(group)
    for _ in range(4):
        assert scheduler.schedule().steps == 1
    encoded = True
    assert [chunk.owner for chunk in scheduler.schedule().chunks] == [late]


def test_pages_move_to_the_host_once():
    """A batch that moves pages must last one step: repeating it would move them again."""
    scheduler = Scheduler(6, PAGE, LaterRoundFirst(watermark=0.0), max_running=8, host_pages=9)
    group, lengths = group_of([12, 12, 12])
    scheduler.submit(group)
    run = Trace(scheduler, lengths)
    run.run()
    moving = [batch for batch in run.batches if batch.evicted or batch.restored]
    assert moving and len(set(map(id, moving))) == len(moving)
    assert all(batch.steps == 1 for batch in moving)


def step_of(scheduler: Scheduler) -> Batch:
    batch = scheduler.schedule()
    scheduler.check_integrity()
    return batch


def test_idle_prompts_are_dropped_before_rollouts_are_preempted():
    """KV that no running rollout reads is cheaper to drop than that of a running rollout."""
    scheduler = Scheduler(11, PAGE, LaterRoundFirst(watermark=0.0), max_running=2, token_budget=16)
    kept = Segment(8)
    first, _ = group_of([1], (kept,))
    scheduler.keep(kept)
    scheduler.submit(first)
    step_of(scheduler), step_of(scheduler)
    scheduler.finish(first.rollouts[0], "stop")
    assert scheduler.tree.free_pages == 9
    group, _ = group_of([40, 40], problem=1)
    scheduler.submit(group)
    while kept.node >= 0:
        assert scheduler.tree.free_pages >= 0 == scheduler.counts.preemptions
        step_of(scheduler)
    assert scheduler.counts.preemptions == 0
    assert scheduler.counts.recomputed == 8


def test_no_prefill_without_a_free_batch_index():
    """With all batch indices in use, a prompt's KV would only take pages from running rollouts."""
    scheduler = Scheduler(100, PAGE, LaterRoundFirst(), max_running=1, token_budget=16)
    first, _ = group_of([40])
    second, _ = group_of([1], (Segment(8),), problem=1)
    scheduler.submit(first)
    scheduler.submit(second)
    for _ in range(9):
        assert not step_of(scheduler).chunks
    scheduler.finish(first.rollouts[0], "stop")
    assert step_of(scheduler).chunks


def test_nothing_starts_below_a_segment_written_in_this_step():
    """A second group below a shared segment must wait until an earlier step has written the
    segment."""
    scheduler = Scheduler(100, PAGE, LaterRoundFirst(), max_running=4, token_budget=32)
    shared = Segment(6)
    groups = [group_of([3], (shared,), problem=problem)[0] for problem in (0, 1)]
    for group in groups:
        scheduler.submit(group)
    first = step_of(scheduler)
    assert [chunk.owner for chunk in first.chunks] == [shared] and not first.decode
    assert len(step_of(scheduler).decode) == 2


def test_the_heap_of_ends_stays_small():
    """An entry for each verified draft, or for each rollout that ended long before its max_tokens:
    their number must be bounded by the running rollouts, and no end may be missed."""
    scheduler = Scheduler(9000, PAGE, LaterRoundFirst(), max_running=8, token_budget=64)
    most = 2 * 8 + MIN_ENDS + 1
    for problem in range(50):  # these end early
        group, _ = group_of([1] * 8, problem=problem, slack=3000)
        scheduler.submit(group)
        scheduler.schedule()
        for rollout in group.rollouts:
            scheduler.finish(rollout, "stop")
        assert len(scheduler._ends) <= most
    group, _ = group_of([3000 - 100 * index for index in range(8)])
    scheduler.submit(group)
    while scheduler.groups:
        batch = scheduler.schedule()
        decode = batch.decode if batch else ()
        for rollout in group.rollouts:
            left = rollout.max_tokens - rollout.scheduled
            assert left >= 0, "an end was missed"
            if rollout.index % 3 and left and scheduler.append_draft(rollout, min(3, left)):
                scheduler.settle_draft(rollout, rollout.index % min(3, left))
            if not left and rollout not in decode and not rollout.finish_reason:
                scheduler.finish(rollout, "length")
        assert len(scheduler._ends) <= most


def test_ended_rollouts_are_freed():
    """Guards against a leak: ended rollouts must be collectable, even if their max_tokens were far
    off."""
    scheduler = Scheduler(1000, PAGE, LaterRoundFirst(), max_running=4, token_budget=32)
    for problem in range(20):
        group, _ = group_of([900] * 4, problem=problem)
        scheduler.submit(group)
        step_of(scheduler)
        for rollout in group.rollouts:
            scheduler.finish(rollout, "stop")
        del group, rollout
    assert scheduler.schedule() is None
    gc.collect()  # a group and its rollouts refer to each other
    rollouts = [item for item in gc.get_objects() if type(item) is Rollout]
    alive = [rollout for rollout in rollouts if rollout.finish_reason == "stop"]
    # Those of the last batch may be alive.
    assert sum(rollout.max_tokens == 900 for rollout in alive) <= 4


def test_a_group_that_waits_keeps_nothing_from_others():
    """A prompt that was found, but whose rollout does not fit, in the way of one that runs."""
    scheduler = Scheduler(8, 64, POLICIES["fcfs"]())
    content = tuple(range(4 * 64))
    before, _ = group_of([1], (Segment(len(content), content=content),))
    scheduler.submit(before)
    while before in scheduler.groups:
        batch = scheduler.schedule()
        for rollout in batch.sampled:
            scheduler.finish(rollout, "stop")
    assert len(scheduler.tree.kept) == 1
    running, _ = group_of([64 * 5])
    waiting, _ = group_of([64 * 4], (Segment(len(content), content=content),))
    scheduler.submit(running)
    (rollout,) = running.rollouts
    while rollout.scheduled < 64 * 4:
        scheduler.schedule()
    scheduler.submit(waiting)
    while rollout.scheduled < rollout.max_tokens:
        scheduler.schedule()
        scheduler.check_integrity()
        assert waiting.path[0].node < 0
    assert scheduler.counts.found == scheduler.counts.recomputed == 0
    assert scheduler.tree.length(rollout.node) == 64 * 5
