"""Tests of the vision encoder against transformers' Step3p7VisionModel, timm's PE-lang and fp64."""

import pytest
import torch
from torch import Tensor

from bench.validate import timm_judge, transformers_judge
from kernels.vision_attention import vision_attention
from model.config import TINY
from model.errors import InputError
from model.step3vl import Step3VL
from model.text.prompt import image_ids
from model.vision.image import Views
from tests.support.errors import max_error

FORMS = ("eager", "portable")
VISION = TINY.vision


@pytest.fixture(scope="module")
def tiny() -> Step3VL:
    return Step3VL.from_preset("tiny", seed=1)


@pytest.mark.judge
@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("side", [VISION.image_size, VISION.crop_size, 70])
def test_tower_and_downsamplers(tiny: Step3VL, impl: str, side: int):
    """Guards patches, positions, rotation, blocks and convolutions, at both view sizes and a 5 x 5
    grid."""
    vision = Step3VL.from_preset("tiny", seed=1, impl=impl).vision
    view = torch.randn(3, side, side, generator=torch.Generator().manual_seed(side))
    expected = transformers_judge.features(tiny, [view])
    with torch.inference_mode():
        assert max_error(vision([view]), expected) < 1e-4


@pytest.mark.parametrize("impl", FORMS)
def test_views_in_one_batch(tiny: Step3VL, impl: str):
    """Guards against features that depend on other views of the batch; sizes are interleaved."""
    vision = Step3VL.from_preset("tiny", seed=1, impl=impl).vision
    generator = torch.Generator().manual_seed(0)
    sides = [112, 112, 168, 112, 168, 168]
    views = [torch.randn(3, side, side, generator=generator) for side in sides]
    with torch.inference_mode():
        together = vision(views)
        alone = torch.cat([vision([view]) for view in views])
        assert max_error(together, alone) < 1e-5
        assert vision([]).shape == (0, TINY.decoder.hidden)


def test_a_caller_may_pause_between_blocks(tiny: Step3VL):
    """A tower that never offers a pause, or computes something else with it; a CUDA graph, which
    cannot pause."""
    vision, pauses, graphs = tiny.vision, [], []
    vision.graphs.find = lambda *args: graphs.append(args)
    try:
        views = [torch.randn(3, side, side) for side in (112, 168)]
        paused = vision(views, between=lambda: pauses.append(None))
        assert len(pauses) == VISION.layers and not graphs
        assert torch.equal(paused, vision(views)) and graphs
    finally:
        del vision.graphs.find


@pytest.mark.judge
@pytest.mark.parametrize("side", [VISION.image_size, VISION.crop_size])
def test_blocks_against_timm(tiny: Step3VL, side: int):
    """Guards the blocks with a second, unrelated implementation, whose rotation is interleaved as
    published."""
    view = torch.randn(3, side, side, generator=torch.Generator().manual_seed(side))
    with torch.inference_mode():
        expected = timm_judge.tokens(tiny, view)
        grids = tiny.vision.grids([view])
        ours = tiny.vision.tower(tiny.vision.patches([view], grids), grids)
        assert max_error(ours, expected) < 1e-4


@pytest.mark.judge
def test_whole_model(tiny: Step3VL):
    """Guards the rows of image features, against transformers' vision model, a linear layer and
    Qwen3 combined."""
    generator = torch.Generator().manual_seed(5)
    photos = [
        Views(
            image=torch.randn(3, 168, 168, generator=generator),
            crops=torch.randn(crops, 3, 112, 112, generator=generator),
            newlines=(False,) * crops,
        )
        for crops in (2, 0)
    ]
    ids = []
    for photo in photos:
        ids += [7, *image_ids(photo.newlines, TINY)]
    ids = torch.tensor([*ids, 9, 10, 11])
    views = [*photos[0].all, *photos[1].all]
    expected = transformers_judge.logits(tiny, ids, views)
    assert max_error(tiny(ids, images=photos), expected) < 1e-4
    with pytest.raises(InputError, match="26 <im_patch> tokens, but the images need 9"):
        tiny(ids, images=photos[1:])


@pytest.mark.parametrize("impl", FORMS)
def test_attention_positions_are_axial(impl: str):
    """Guards the rotation: by column in the first half of a head, by row in the second."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(12, 3 * 8, generator=generator)
    base = vision_attention(qkv, [(3, 4)], heads=1, impl=impl)
    expected = axial_attention_by_hand(qkv.double(), 3, 4)
    assert max_error(base, expected) < 1e-5
    assert max_error(vision_attention(qkv, [(4, 3)], heads=1, impl=impl), expected) > 1e-2


def axial_attention_by_hand(qkv: Tensor, rows: int, columns: int) -> Tensor:
    """One head of 8 in fp64: pairs as complex numbers, rotated by exp(i angle)."""
    q, k, v = (part.contiguous() for part in qkv.chunk(3, dim=1))
    frequencies = torch.tensor([1.0, 1e4**-0.5], dtype=torch.float64)
    rotated = []
    for x in (q, k):
        z = torch.view_as_complex(x.view(-1, 4, 2)).clone()
        for token in range(rows * columns):
            row, column = divmod(token, columns)
            angle = torch.cat([column * frequencies, row * frequencies])
            z[token] *= torch.polar(torch.ones_like(angle), angle)
        rotated.append(torch.view_as_real(z).flatten(1))
    return (rotated[0] @ rotated[1].T / 8**0.5).softmax(-1) @ v


def views_of(*sides: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, side, side, generator=generator) for side in sides]


def test_views_of_one_grid_run_adjacently(tiny: Step3VL, monkeypatch: pytest.MonkeyPatch):
    """Guards against one run per view: images alternate crops and global views, but each op should
    see one run of views per grid."""
    seen = []
    encode = tiny.vision.encode

    def spy(patches: Tensor, grids: tuple, *where: Tensor) -> Tensor:
        seen.append(grids)
        return encode(patches, grids, *where)

    monkeypatch.setattr(tiny.vision, "encode", spy)
    views = views_of(112, 168, 112, 112, 168)
    together = tiny.vision(views)
    assert seen == [((8, 8),) * 3 + ((12, 12),) * 2]
    assert max_error(together, torch.cat([tiny.vision([view]) for view in views])) < 1e-5


def test_prepare_follows_the_weights():
    """Guards against folded weights, interpolated positions or cached images of old weights."""
    model, other = (Step3VL.from_preset("tiny", seed=seed) for seed in (1, 2))
    photo = Views(views_of(168)[0], torch.empty(0, 3, 112, 112), ())
    views = views_of(70, 112)
    model.vision(views), model.encode_images([photo])
    for name, tensor in other.checkpoint_tensors().items():
        model.checkpoint_tensors()[name].copy_(tensor)
    model.vision.prepare()
    assert torch.equal(model.vision(views), other.vision(views))
    assert torch.equal(model.encode_images([photo]), other.encode_images([photo]))


def test_another_dtype_needs_no_prepare():
    """Guards against derived tensors that Module.to leaves in fp32."""
    model = Step3VL.from_preset("tiny", seed=1)
    views = views_of(70)
    model.vision(views)
    half = Step3VL.from_preset("tiny", seed=1, dtype=torch.bfloat16)
    assert torch.equal(model.to(torch.bfloat16).vision(views), half.vision(views))


def test_derived_tensors_are_no_weights(tiny: Step3VL):
    """Guards against derived tensors in a checkpoint, changed weights, and a definition that uses
    them."""
    vision = Step3VL.from_preset("tiny", seed=1).vision
    weights = {name: tensor.clone() for name, tensor in vision.checkpoint_tensors().items()}
    vision(views_of(70, 168))
    assert {t.data_ptr() for t in vision.state_dict().values()} == {
        t.data_ptr() for t in vision.checkpoint_tensors().values()
    }
    for name, tensor in vision.checkpoint_tensors().items():
        assert torch.equal(tensor, weights[name]), name
    vision._folded = tuple(torch.full_like(tensor, torch.nan) for tensor in vision._folded)
    assert vision(views_of(70)).isnan().all()
    vision.impl["projector"] = "eager"
    assert max_error(vision(views_of(70)), tiny.vision(views_of(70))) < 1e-5


def test_mistakes_are_named(tiny: Step3VL):
    """Guards against grids beyond the position embedding, dropped pixels and mixed views."""
    small = torch.zeros(3, 28, 28)
    for view, message in [
        (torch.zeros(3, 182, 182), "view 1 has 13 x 13 patches; sides must have 1 to 12"),
        (torch.zeros(3, 0, 28), "view 1 has 0 x 2 patches; sides must have 1 to 12"),
        (torch.zeros(3, 28, 30), "view 1 has 28 x 30 pixels; sides must be multiples of 14"),
        (
            torch.zeros(4, 28, 28),
            r"view 1 has shape \[4, 28, 28\]; it must be \[3, height, width\]",
        ),
        (torch.zeros(28, 28), r"view 1 has shape \[28, 28\]; it must be"),
        (small.double(), "view 1 is torch.float64 on cpu, but view 0 is torch.float32 on cpu"),
        (small.to("meta"), "view 1 is torch.float32 on meta, but view 0 is torch.float32 on cpu"),
    ]:
        with pytest.raises(ValueError, match=message):
            tiny.vision([small, view])
    with pytest.raises(ValueError, match="one row per token of the grids: 12, not 11"):
        vision_attention(torch.zeros(11, 24), [(3, 4)], heads=1)
    for width in (0, 25):
        with pytest.raises(ValueError, match="qkv must be"):
            vision_attention(torch.zeros(12, width), [(3, 4)], heads=1)
    with pytest.raises(ValueError, match="heads must be 1 or more, not 0"):
        vision_attention(torch.zeros(12, 24), [(3, 4)], heads=0)
