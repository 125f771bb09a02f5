"""The queue of views: batches, order, and what every job is promised."""

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pacore_sched.sched.view_queue import ViewQueue

GLOBAL, CROP = 2704, 1296  # patches of a global view and of a crop
SMALL, LARGE = [GLOBAL], [CROP] * 36 + [GLOBAL]

Batch = list[tuple[str, int, int]]


def batches_of(queue: ViewQueue) -> list[Batch]:
    batches = []
    while queue:
        batches.append(queue.next())
    return batches


def ends(jobs: dict[str, list[int]], batches: list[Batch]) -> dict[str, int]:
    """The batch, from 1, that has the last view of each job."""
    stop = {job: len(views) for job, views in jobs.items()}
    return {
        job: number
        for number, batch in enumerate(batches, 1)
        for job, _, end in batch
        if end == stop[job]
    }


def filled(max_tokens: int, jobs: dict[str, list[int]]) -> ViewQueue:
    queue: ViewQueue = ViewQueue(max_tokens)
    for job, views in jobs.items():
        queue.add(job, views)
    return queue


JOBS = st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=12), max_size=8).map(
    lambda jobs: {str(index): views for index, views in enumerate(jobs)}
)


@given(JOBS, st.integers(1, 40))
def test_every_view_is_encoded_once_and_in_order(
    jobs: dict[str, list[int]], max_tokens: int
) -> None:
    """A view that is dropped, taken twice, or comes before an earlier one of its image."""
    queue, left = filled(max_tokens, jobs), sum(map(sum, jobs.values()))
    encoded = defaultdict(list)
    while queue:
        assert queue.tokens == left
        batch = queue.next()
        assert len({job for job, _, _ in batch}) == len(batch)
        for job, start, stop in batch:
            encoded[job] += range(start, stop)
            left -= sum(jobs[job][start:stop])
    assert encoded == {job: list(range(len(views))) for job, views in jobs.items()}
    assert left == queue.tokens == 0 and queue.next() == []


@given(JOBS, st.integers(1, 40))
def test_batches_are_full(jobs: dict[str, list[int]], max_tokens: int) -> None:
    """A batch over the limit, unless it is one view; or one with room for some job's next view."""
    queue, starts = filled(max_tokens, jobs), dict.fromkeys(jobs, 0)
    while queue:
        batch = queue.next()
        tokens = sum(sum(jobs[job][start:stop]) for job, start, stop in batch)
        starts.update((job, stop) for job, _, stop in batch)
        views = sum(stop - start for _, start, stop in batch)
        assert tokens <= max_tokens or views == 1
        for job, start in starts.items():
            assert all(tokens + view > max_tokens for view in jobs[job][start : start + 1])


@given(JOBS, st.integers(1, 40))
def test_the_oldest_gets_half(jobs: dict[str, list[int]], max_tokens: int) -> None:
    """An image that starves: others, however small or many, take the room of the oldest."""
    queue, starts = filled(max_tokens, jobs), dict.fromkeys(jobs, 0)
    while queue:
        oldest = next(job for job in jobs if starts[job] < len(jobs[job]))
        batch = queue.next()
        taken = {job: sum(jobs[job][start:stop]) for job, start, stop in batch}
        starts.update((job, stop) for job, _, stop in batch)
        following = jobs[oldest][starts[oldest] : starts[oldest] + 1]
        assert taken[oldest] > 0
        assert all(taken[oldest] + view > max_tokens // 2 for view in following)


@given(JOBS, st.integers(1, 40))
def test_a_job_waits_for_smaller_ones_and_half_of_each_batch(
    jobs: dict[str, list[int]], max_tokens: int
) -> None:
    """A job that is delayed by larger ones beyond their half of the batches: against a bound of
    its own work and that of smaller or older equal jobs, in batches half of which it can use."""
    largest = max((view for views in jobs.values() for view in views), default=0)
    ended = ends(jobs, batches_of(filled(max_tokens, jobs)))
    for index, (job, views) in enumerate(jobs.items()):
        ahead = [
            other
            for number, other in enumerate(jobs.values())
            if (sum(other), number) <= (sum(views), index)
        ]
        usable = max_tokens // 2 - 2 * largest
        if usable > 0:
            assert ended[job] <= len(ahead) + -(-sum(map(sum, ahead)) // usable)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(1, 8), st.integers(1, 40))
def test_equal_jobs_end_in_order(views: list[int], count: int, max_tokens: int) -> None:
    """A later one of equal images that overtakes an earlier one."""
    jobs = {str(index): views for index in range(count)}
    ended = ends(jobs, batches_of(filled(max_tokens, jobs)))
    assert [ended[job] for job in jobs] == sorted(ended.values())


@given(st.integers(1, 20), st.integers(1, 12), st.integers(1, 8), st.integers(1, 40))
def test_equal_jobs_do_not_share_batches(
    view: int, views: int, count: int, max_tokens: int
) -> None:
    """Equal images that all end late, because each gets a part of every batch."""
    jobs = {str(index): [view] * views for index in range(count)}
    for batch in batches_of(filled(max_tokens, jobs)):
        unfinished = [job for job, _, stop in batch if stop < views]
        assert len(unfinished) <= 2  # the oldest, which has its half, and the next


def test_a_small_photo_beside_a_large_one() -> None:
    """A photo of one view that waits for all 37 of a large one."""
    queue = filled(16_384, {"large": LARGE})
    assert queue.next() == [("large", 0, 12)]
    queue.add("small", SMALL)
    assert queue.next() == [("large", 12, 22), ("small", 0, 1)]  # 6 crops, then 4 in the rest
    assert queue.next() == [("large", 22, 34)]


def test_a_view_beyond_the_limit_is_alone() -> None:
    queue = filled(1000, {"small": [10], "large": [CROP, 10]})
    assert batches_of(queue) == [[("small", 0, 1)], [("large", 0, 1)], [("large", 1, 2)]]


def test_removed_jobs() -> None:
    """A job in the queue after its removal, with views that no batch has taken or without."""
    queue = filled(20, {"a": [10] * 4, "b": [10]})
    assert queue.next() == [("a", 0, 1), ("b", 0, 1)] and len(queue) == 1
    queue.remove("a")
    queue.remove("b")
    assert not queue and queue.tokens == 0
    queue.add("a", [10])
    assert queue.next() == [("a", 0, 1)]


def test_jobs_that_cannot_wait() -> None:
    queue = filled(20, {"a": [10]})
    with pytest.raises(ValueError, match="already in the queue"):
        queue.add("a", [10])
    for views in ([], [10, 0]):
        with pytest.raises(ValueError, match="at least 1 patch"):
            queue.add("b", views)
