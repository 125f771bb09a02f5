"""The check of prefix attention's schedule: a wrong one is an error with its numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from bench.inputs import Node, fork, prefix_attention_inputs
from kernels._tiles import Gpu, assume_gpu, use_tiles
from kernels.prefix_attention import prefix_attention
from kernels.prefix_attention_launch import cut_up
from kernels.prefix_check import check_schedule
from kernels.prefix_schedule import Schedule, schedule_of
from tests.test_rotary_attention import run as fused
from tests.test_rotary_attention import step

TOY = Gpu("toy", arch=90, sms=5, shared_bytes=227 * 1024)
# Tiles of both sizes, several for most programs, and nodes without a token, which are passed over.
FOREST = [fork(20, [1, 7, 2, 17, 3]), Node(9, new=5), Node(0, children=(Node(3, new=1),))]


@contextmanager
def checking() -> Iterator[None]:
    token = check_schedule.set(True)
    try:
        yield
    finally:
        check_schedule.reset(token)


def inputs_of(device: str) -> dict:
    shape = {"heads": 8, "kv_heads": 2, "head_dim": 16, "page_size": 16}
    return prefix_attention_inputs(
        0, device, torch.float32, forest=FOREST, return_lse=True, **shape
    )


@contextmanager
def toy(grain: int = 4) -> Iterator[None]:
    with assume_gpu(TOY), use_tiles("prefix_attention", programs=1, grain=grain, overhead=1):
        yield


def schedule_in(inputs: dict) -> Schedule:
    """The one that the next run will use."""
    with toy():
        cut, _ = cut_up(inputs["plan"], inputs["q"], 8, inputs["k_pages"], window=0)
    return schedule_of(inputs["plan"], cut)


def no_such_tile(schedule: Schedule) -> None:
    schedule.first_tile.fill_(1 << 20)


def tile_before(schedule: Schedule) -> None:
    schedule.first_tile.zero_()


def tile_behind(schedule: Schedule) -> None:
    schedule.first_tile[:, 0] += 1


def stretch_too_long(schedule: Schedule) -> None:
    schedule.stretch += 3


def sums_that_fall(schedule: Schedule) -> None:
    schedule.starts[1] = 100


def sums_that_stay(schedule: Schedule) -> None:
    schedule.starts[1] = 0


SPOILS = [no_such_tile, tile_before, tile_behind, stretch_too_long, sums_that_fall, sums_that_stay]


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__)
def test_a_wrong_schedule_is_an_error(triton_device, spoil):
    """Guards against a loop that never ends, or reads what is not there: nothing told where."""
    inputs = inputs_of(triton_device)
    schedule = schedule_in(inputs)
    assert all(schedule.counts), "tiles of both sizes"
    spoil(schedule)
    numbers = r"program \d, at place \d+ of a stretch that ends at \d+, was led to tile \d+ of the "
    numbers += r"(larger|smaller) size, which has \d+ tiles; the tile spans -?\d+ places and "
    numbers += r"needs \d+, and the place is -?\d+ past"
    with toy(), checking(), pytest.raises(RuntimeError, match=numbers):
        prefix_attention(**inputs, impl="triton")


@pytest.mark.parametrize("invariant", [False, True])
def test_a_sound_schedule_gives_the_same_bits(triton_device, invariant):
    """Guards the loop under the check: it must end where the loop without it ends."""
    call = partial(prefix_attention, impl="triton", batch_invariant=invariant)
    inputs = inputs_of(triton_device)
    with toy(grain=16 if invariant else 4):
        plain = call(**inputs)
        with checking():
            assert all(map(torch.equal, call(**inputs), plain))


def test_the_fused_form_is_checked(triton_device):
    """Guards the decode step's fused form, which launches the same kernel."""
    inputs, options = step(triton_device), {"fused": True, "impl": "triton"}
    plain, _ = fused(inputs, **options)
    with checking():
        assert torch.equal(fused(inputs, **options)[0], plain)
        (schedule,) = inputs["plan"].schedules.values()
        no_such_tile(schedule)
        with pytest.raises(RuntimeError, match="was led to tile 1048576 of the smaller size"):
            fused(inputs, **options)
