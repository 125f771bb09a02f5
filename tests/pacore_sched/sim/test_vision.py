"""Simulated images: the tower's cost against other counts, and when images are encoded."""

from dataclasses import replace
from itertools import accumulate
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.inputs.views import tower_flops
from model.config import STEP3_VL_10B, TINY
from model.text.prompt import image_ids
from model.vision.image import crop_layout
from pacore_sched.sched.view_queue import MAX_PATCHES
from pacore_sched.sim.cost_model import weight_bytes
from pacore_sched.sim.machine import MACHINES, Machine
from pacore_sched.sim.vision.cost import RooflineVision, VisionWork
from pacore_sched.sim.vision.encoder import SimEncoder
from pacore_sched.sim.workload import PHOTO_720P, PHOTO_1080P, Photo

WORK = VisionWork(STEP3_VL_10B.vision, STEP3_VL_10B.decoder.hidden)
# Two images at a time take 1 s per 1,000 pixels; a pixel's 3 bytes take 1 ms to the device.
HOST = Machine("toy", 1, 1, 1, host_workers=2, host_pixel_s=1e-3, link_gb_s=3e-6)


class PlainCost:
    """A second per view, whatever its size, and 0.5 s per call."""

    work = VisionWork(replace(STEP3_VL_10B.vision, crop_size=14), 8)

    def seconds(self, views):
        return 0.5 + len(views)


@pytest.mark.parametrize("config", [STEP3_VL_10B, TINY], ids=lambda config: config.name)
def test_flops_against_the_benchmarks(config):
    """A part of the tower or the projector whose FLOPs are not counted, or counted twice."""
    work = VisionWork(config.vision, config.decoder.hidden)
    for sides in ([36], [52], [52, 36, 36], [1, 2, 3, 5]):
        views = [side**2 for side in sides]
        flops = work.linear_flops(views) + work.attention_flops(views)
        assert flops == tower_flops([(side, side) for side in sides], config)


def test_flops_and_bytes_of_a_view_by_hand():
    """A crop without 5.0 TFLOP, a global view without 11.5, or other weights than the model's."""
    linear, attention = 2 * 47 * (4 * 1536**2 + 2 * 1536 * 8960), 4 * 47 * 1536
    for patches, total in ((36**2, 5.0e12), (52**2, 11.5e12)):
        flops = WORK.linear_flops([patches])
        assert 1 < flops / (patches * linear) < 1.03  # the embedding and the projector
        assert WORK.attention_flops([patches]) == patches**2 * attention
        assert flops + WORK.attention_flops([patches]) == pytest.approx(total, rel=0.01)
    # A weight is 2 bytes. The convolution that is folded with the linear layer has fewer.
    published = weight_bytes(STEP3_VL_10B) - weight_bytes(replace(STEP3_VL_10B, vision=None))
    unfolded = 9 * 3072 * 6144 + 6144 * 4096
    folded = 9 * 3072 * 4096
    assert WORK.linear_bytes([]) == published + 2 * (588 * 1536 + folded - unfolded)
    more = WORK.linear_bytes([7, 3]) - WORK.linear_bytes([])
    assert more == 2 * 10 * 47 * (3 + 1 + 1 + 1 + 1 + 1) * 1536 + 2 * 10 * 47 * 2 * 8960
    assert WORK.attention_bytes([7, 3]) == 2 * 10 * 47 * 4 * 1536


@pytest.mark.parametrize(
    ("photo", "size"), [(PHOTO_720P, (1280, 720)), (PHOTO_1080P, (1920, 1080))]
)
def test_photos_are_cut_as_the_model_cuts_them(photo, size):
    """A workload whose images have other views or tokens than the model would make of them."""
    vision = STEP3_VL_10B.vision
    layout = crop_layout(*size, vision)
    assert photo.pixels == size[0] * size[1]
    assert photo.crops == len(layout.boxes)
    assert photo.tokens == len(image_ids(layout.newlines, STEP3_VL_10B))
    assert WORK.views(photo) == (36**2,) * len(layout.boxes) + (52**2,)
    assert WORK.pixel_bytes(photo) == 3 * (photo.pixels + 504**2 * photo.crops)


def test_roofline():
    """A tower that is slower than both limits, or faster than one of them."""
    machine = MACHINES["h100"]
    cost = RooflineVision(WORK, machine)
    views = WORK.views(PHOTO_720P)
    flops = WORK.linear_flops(views) / 0.85 + WORK.attention_flops(views) / 0.60
    assert cost.seconds(views) == pytest.approx(flops / (0.7 * 989e12) + 0.4e-3)
    moved = WORK.linear_bytes([1]) + WORK.attention_bytes([1])  # of a view that is too small
    assert cost.seconds([1]) == pytest.approx(moved / (0.9 * 0.9 * 3350e9) + 0.4e-3)


def test_host_link_and_tower_by_hand():
    """More images on the host than it has workers, pixels that take no time to the device, a batch
    that waits for images on the host, or an image that is encoded twice."""
    encoder = SimEncoder(PlainCost(), HOST, slowdown=2.0)
    photo = Photo(1000, 1, crops=0)
    ready = [encoder.submit(number, [photo], 0.0) for number in range(3)]
    assert encoder.quiet_until(0.0) == pytest.approx(1 + 1)  # read, then sent
    assert encoder.batch_s(2.0) == 0.5 + 2
    assert encoder.run(2.0, 2.0) == 2.0 and not any(encoded() for encoded in ready)
    assert encoder.quiet_until(4.0) == 4.0
    assert encoder.run(9.0, 4.0) == 0.5 + 1.5  # the third has come meanwhile
    assert all(encoded() for encoded in ready)
    assert encoder.quiet_until(6.0) == inf
    again = encoder.submit(1, [photo], 7.0)
    assert again() and encoder.quiet_until(7.0) == inf
    assert encoder.alone_s([photo, photo]) == pytest.approx(2 + 2.5)
    assert encoder.alone_s([photo] * 3) == pytest.approx(2 + 2.5 + 1.5)


def test_images_one_at_a_time():
    """Images that share a batch although each should be encoded alone, or views left out."""
    encoder = SimEncoder(PlainCost(), HOST, slowdown=2.0, max_patches=0)
    ready = encoder.submit(0, [Photo(1, 1, crops=4), Photo(1, 1, crops=0)], 0.0)
    batches = []
    while not ready():
        batches.append(encoder.run(encoder.batch_s(1.0), 1.0))
    assert sorted(batches) == [0.5 + 1, 0.5 + 5]
    assert encoder.quiet_until(1.0) == inf


@pytest.mark.parametrize(("slowdown", "spent"), [(1.25, 0.2), (2.0, 0.8), (inf, 8.5)])
def test_budget(slowdown, spent):
    """A step that is slowed by more than the budget, or by less although images wait. Without a
    budget, a step waits for a whole batch, but not for the next one."""
    encoder = SimEncoder(PlainCost(), HOST, slowdown)
    encoder.submit(0, [Photo(1, 1, crops=2)], 0.0)
    size = PlainCost.work.vision.grid**2
    encoder.submit(1, [Photo(1, 1, crops=0)] * (MAX_PATCHES // size), 0.0)
    assert encoder.beside(0.8, 0.5) == pytest.approx(spent)


@given(
    submissions=st.lists(st.tuples(st.floats(0, 9), st.integers(0, 12), st.integers(1, 2000))),
    limits=st.lists(st.floats(0.01, 3), min_size=1),
)
def test_every_view_is_encoded_once(submissions, limits):
    """Seconds of the tower that are lost or counted twice when batches are interrupted, or an image
    that is ready before its pixels have come and all of its views have been encoded."""
    cost, batches = PlainCost(), []
    encoder = SimEncoder(cost, HOST, slowdown=2.0)
    seconds = cost.seconds
    cost.seconds = lambda views: batches.append(list(views)) or seconds(views)
    clock, used, pending, earliest = 0.0, 0.0, {}, {}
    starts = [*accumulate(gap for gap, _, _ in submissions)]
    todo = list(enumerate(zip(starts, submissions, strict=True)))
    turn = 0
    while todo or pending:
        if todo and todo[0][1][0] <= clock:
            number, (_, (_, crops, pixels)) = todo.pop(0)
            pending[number] = encoder.submit(number, [Photo(pixels, 1, crops)], clock)
            bytes_ = 3 * (pixels + crops * 14**2)
            earliest[number] = clock + 1e-3 * pixels + bytes_ / 3e3 + 1.5 + crops
            continue
        next_s = min(encoder.quiet_until(clock), todo[0][1][0] if todo else inf)
        if next_s > clock:
            clock = next_s
            continue
        limit = limits[turn % len(limits)]
        turn += 1
        spent = encoder.run(limit, clock)
        assert 0 < spent <= limit * (1 + 1e-9)
        used, clock = used + spent, clock + spent
        for number in [number for number, encoded in pending.items() if encoded()]:
            del pending[number]
            assert clock >= earliest[number] - 1e-6
    assert used == pytest.approx(sum(map(seconds, batches)))
    assert sum(map(len, batches)) == sum(crops + 1 for _, crops, _ in submissions)
