"""The debug check of prefix attention's schedule: a wrong one is an error with numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from bench.inputs.trees import Node, fork
from bench.suite.prefix_attention import inputs as prefix_attention_inputs
from kernels.prefix_attention import prefix_attention
from kernels.prefix_attention.check import check_schedule
from kernels.prefix_attention.launch import plan_launch
from kernels.prefix_attention.records import HIGH, LOW, NEXT, ROWS
from kernels.prefix_attention.schedule import Schedule, schedule_of
from kernels.runtime.configs import Gpu, assume_gpu, use_config
from tests.kernels.test_rotary_attention import run as fused
from tests.kernels.test_rotary_attention import step

TOY = Gpu("toy", arch=90, sms=5, shared_bytes=227 * 1024)
# Tiles of both sizes, several for most programs, and nodes without tokens, which are skipped.
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
def toy(grain: int = 4, pieces: int = 1) -> Iterator[None]:
    config = {"programs": 1, "grain": grain, "overhead": 1, "pieces": pieces}
    with assume_gpu(TOY), use_config("prefix_attention", **config):
        yield


def schedule_in(inputs: dict, pieces: int) -> Schedule:
    """The schedule that the next run will use."""
    with toy(pieces=pieces):
        spec, _ = plan_launch(inputs["plan"], inputs["q"], 8, inputs["pages"], window=0)
    return schedule_of(inputs["plan"], spec)


def no_such_tile(schedule: Schedule) -> None:
    schedule.first_tile.fill_(1 << 20)


def tile_before(schedule: Schedule) -> None:
    schedule.first_tile.zero_()


def tile_after(schedule: Schedule) -> None:
    schedule.first_tile[:, 0] += 1


def range_too_long(schedule: Schedule) -> None:
    schedule.range_length += 3


def sums_that_fall(schedule: Schedule) -> None:
    schedule.starts[1] = 100


def sums_that_stay(schedule: Schedule) -> None:
    schedule.starts[1] = 0


CORRUPTIONS = [
    no_such_tile,
    tile_before,
    tile_after,
    range_too_long,
    sums_that_fall,
    sums_that_stay,
]


@pytest.mark.parametrize("pieces", [0, 1], ids=["line", "pieces"])
@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda corrupt: corrupt.__name__)
def test_a_wrong_schedule_is_an_error(triton_device, corrupt, pieces):
    """Guards against a loop that never ends, or an illegal read, without a word about where."""
    inputs = inputs_of(triton_device)
    schedule = schedule_in(inputs, pieces)
    assert all(schedule.counts), "tiles of both sizes"
    corrupt(schedule)
    numbers = r"program \d, at position \d+ of a work range that ends at \d+, was sent to tile \d+ "
    numbers += r"of the (larger|smaller) size, which has \d+ tiles; the tile's length is -?\d+ and "
    numbers += r"should be \d+, and the position is -?\d+ past"
    with toy(pieces=pieces), checking(), pytest.raises(RuntimeError, match=numbers):
        schedule.write_pieces() if pieces else prefix_attention(**inputs, impl="triton")


WRONG_PIECE = (
    r"program \d was sent to piece \d+ of \d+, which has -?\d+ rows, tokens -?\d+ to -?\d+, and"
    r" next piece -?\d+"
)


@pytest.mark.parametrize(
    ("column", "wrong"),
    [(NEXT, 1 << 20), (NEXT, 0), (ROWS, 17), (ROWS, -1), (LOW, 1 << 20), (HIGH, -1)],
)
def test_a_wrong_piece_is_an_error(triton_device, column, wrong):
    """Guards the walk along the pieces: it must not go back, nor to a piece that does not exist."""
    inputs = inputs_of(triton_device)
    schedule = schedule_in(inputs, pieces=1)
    schedule.pieces[:, column.value] = wrong
    with toy(), checking(), pytest.raises(RuntimeError, match=WRONG_PIECE):
        prefix_attention(**inputs, impl="triton")


def test_a_cycle_of_pieces_is_an_error(triton_device):
    """Guards against a walk that never ends although each of its pieces is valid."""
    inputs = inputs_of(triton_device)
    pieces = schedule_in(inputs, pieces=1).pieces
    pieces[:] = pieces[0].clone()
    pieces[:, NEXT.value] = (torch.arange(len(pieces), device=pieces.device) + 1) % len(pieces)
    with toy(), checking(), pytest.raises(RuntimeError, match=WRONG_PIECE):
        prefix_attention(**inputs, impl="triton")


@pytest.mark.parametrize("pieces", [0, 1], ids=["line", "pieces"])
@pytest.mark.parametrize("invariant", [False, True])
def test_a_valid_schedule_gives_the_same_bits(triton_device, invariant, pieces):
    """Guards the loop with the check: it must end where the loop without it ends."""
    call = partial(prefix_attention, impl="triton", batch_invariant=invariant)
    inputs = inputs_of(triton_device)
    with toy(16 if invariant else 4, pieces):
        plain = call(**inputs)
        with checking():
            assert all(map(torch.equal, call(**inputs), plain))


def test_the_fused_form_is_checked(triton_device):
    """Guards the decode step's fused form, which launches the same kernel."""
    inputs, options = step(triton_device), {"fused": True, "impl": "triton"}
    with use_config("prefix_attention", pieces=1):
        plain, _ = fused(inputs, **options)
    with use_config("prefix_attention", pieces=1), checking():
        assert torch.equal(fused(inputs, **options)[0], plain)
        (schedule,) = inputs["plan"].schedules.values()
        schedule.pieces[:, NEXT.value] = 1 << 20
        with pytest.raises(RuntimeError, match="was sent to piece 1048576 of"):
            fused(inputs, **options)
