"""timm's PE vision towers, patched, against themselves unpatched."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from bench.validate import timm_judge
from bench.validate.torchvision_stub import torchvision_or_stub
from model.hf import patch, unpatch
from tests.model.hf.towers import OPS, drawn, errs_no_more, ops_called, views
from tests.support.errors import max_error

pytestmark = pytest.mark.judge

PATCH = 4
GRIDS = [(4, 4), (3, 5)]
SELECTIONS = [None, *((op,) for op in OPS)]


def pe_lang(grid: tuple[int, int]) -> nn.Module:
    """STEP3-VL's tower but for the sizes."""
    return drawn(timm_judge.pe_lang(32, 2, 2, 64, grid, patch=PATCH))


def any_pe(name: str, **options) -> nn.Module:
    with torchvision_or_stub():
        from timm.models import eva
    sizes = {"img_size": 16, "patch_size": PATCH, "embed_dim": 32, "depth": 2, "num_heads": 2}
    sizes |= {"ref_feat_shape": (4, 4), "num_classes": 0, "rope_temperature": 100.0}
    return drawn(getattr(eva, name)(**(sizes | options)))


@torch.inference_mode()
def tokens(tower: nn.Module, grid: tuple[int, int] | None = None) -> Tensor:
    weight = tower.patch_embed.proj.weight
    pixels = views(2, *(grid or tower.patch_embed.grid_size), PATCH)
    return tower.forward_features(pixels.to(weight))


@pytest.mark.parametrize("impl", ["eager", "portable"])
@pytest.mark.parametrize("ops", SELECTIONS, ids=str)
def test_every_op_alone_and_together(ops: tuple | None, impl: str):
    """Guards each op's own part, which must also work with the library's other parts: rotation by
    column and row, LayerScale, both residual adds, the weights of each norm."""
    for grid in GRIDS:
        tower = pe_lang(grid)
        expected = tokens(tower)
        patch(tower, ops, impl=impl)
        assert max_error(tokens(tower), expected) < 1e-5


@pytest.mark.interpreter
@pytest.mark.parametrize("ops", SELECTIONS, ids=str)
def test_every_op_in_triton(triton_device: str, ops: tuple | None):
    tower = pe_lang((3, 5)).to(triton_device)
    expected = tokens(tower)
    patch(tower, ops, impl="triton")
    assert max_error(tokens(tower), expected) < (1e-5 if triton_device == "cpu" else 1e-4)


@pytest.mark.interpreter
@pytest.mark.parametrize("impl", ["portable", "triton"])
def test_bf16(triton_device: str, impl: str):
    """Guards against a lost digit: in bf16 the patched tower must be as near to fp32 as the
    library's."""
    tower = pe_lang((3, 5)).to("cpu" if impl == "portable" else triton_device)
    expected = tokens(tower)
    tower.to(torch.bfloat16)
    theirs = tokens(tower)
    patch(tower, impl=impl)
    assert errs_no_more(tokens(tower), theirs, expected)


def test_the_ops_are_called():
    """Guards against a patch that leaves the library's code, whose results are right, too."""
    tower = pe_lang((3, 5))
    called = {"layer_norm": 5, "linear_quick_gelu": 2, "vision_attention": 2, "quick_gelu": 2}
    # vision_attention: two layers and the rotary embedding; layer_norm: two norms of each block,
    # whose second one the block calls itself, and the first norm.
    expected = {"layer_norm": 7, "linear_quick_gelu": 2, "vision_attention": 3}
    assert patch(tower) == expected
    assert ops_called(lambda: tokens(tower)) == called
    unpatch(tower)
    assert not ops_called(lambda: tokens(tower))


def test_unpatch_and_copies():
    """Guards every bit of the library's results, and a copy that computes with the original's
    weights."""
    tower = pe_lang((3, 5))
    expected = tokens(tower)
    patch(tower)
    copy = deepcopy(tower)
    unpatch(tower)
    assert torch.equal(tokens(tower), expected)
    drawn(tower, seed=1)
    assert max_error(tokens(copy), expected) < 1e-5
    patch(tower)
    changed = deepcopy(tower)
    unpatch(changed)
    assert max_error(tokens(tower), tokens(changed)) < 1e-5


@pytest.mark.parametrize(
    "name", ["vit_pe_core_gigantic_patch14_448", "vit_pe_spatial_gigantic_patch14_448"]
)
def test_other_towers_without_class_token(name: str):
    """Guards blocks without LayerScale, an attention pool, intermediate features, timm's own
    quick_gelu."""
    tower = any_pe(name, drop_path_rate=0.1)
    from timm.layers.activations import QuickGELU

    for module in tower.modules():
        if hasattr(module, "act"):
            module.act = QuickGELU()
    pixels = views(2, 4, 4, PATCH)
    with torch.inference_mode():
        last, expected = tower(pixels), tower.forward_intermediates(pixels, intermediates_only=True)
        patch(tower)
        features = tower.forward_intermediates(pixels, intermediates_only=True)
        assert max_error(tower(pixels), last) < 1e-5
    for ours, theirs in zip(features, expected, strict=True):
        assert max_error(ours, theirs) < 1e-5


def test_any_offset_of_positions():
    """Guards the large PE-lang built without its class token, whose positions start at 1."""
    tower = any_pe("vit_pe_lang_large_patch14_448", class_token=False)
    assert tower.rope.grid_offset == 1
    expected = tokens(tower)
    patch(tower, ["vision_attention"])
    assert max_error(tokens(tower), expected) < 1e-5


def test_other_coordinates_are_refused():
    """Guards timm's rotary embedding of other coordinates than indices of patches."""
    tower = any_pe("vit_pe_lang_gigantic_patch14_448")
    tower.rope.grid_type = "centered"
    with pytest.raises(ValueError, match="grid_type is 'centered', not 'index'"):
        patch(tower)


def test_images_of_any_size():
    """Guards the grid of towers that take it from each image, and their rescaled positions."""
    tower = any_pe("vit_pe_lang_gigantic_patch14_448", dynamic_img_size=True)
    tower.rope.ref_feat_shape = None
    expected = [tokens(tower, grid) for grid in GRIDS]
    patch(tower, ["vision_attention"])
    for grid, features in zip(GRIDS, expected, strict=True):
        assert max_error(tokens(tower, grid), features) < 1e-5
    tower.rope.ref_feat_shape = (4, 4)
    assert max_error(tokens(tower, (4, 4)), expected[0]) < 1e-5
    with pytest.raises(ValueError, match=r"ref_feat_shape \(4, 4\) rescales .* grid \(3, 5\)"):
        tokens(tower, (3, 5))


ATTENTION = r"^patch: vision_attention does not fit AttentionRope \(blocks.0.attn\): "
ROTARY = r"^patch: vision_attention does not fit RotaryEmbeddingCat \(rope\): "
REFUSED = [
    ({"class_token": True}, ATTENTION + "1 class or register tokens come before the patches"),
    ({"num_reg_tokens": 2}, ATTENTION + "2 class or register tokens"),
    ({"qkv_fused": False}, ATTENTION + "its projections are separate, not qkv"),
    ({"qk_norm": True}, ATTENTION + "it has a norm, q_norm"),
    ({"scale_attn_inner": True}, ATTENTION + "it has a norm, norm"),
    ({"rope_rotate_half": True}, ATTENTION + "it rotates halves of a head, not adjacent pairs"),
    ({"rope_grid_indexing": "ij"}, ROTARY + "grid_indexing is 'ij', not 'xy'"),
    ({"img_size": 24}, ROTARY + r"ref_feat_shape \(4, 4\) rescales the positions of the grid"),
    ({"rope_type": "mixed"}, r"^patch: RotaryEmbeddingMixed \(rope\) is not known"),
    ({"attn_type": "eva"}, r"^patch: EvaAttention \(blocks.0.attn\) is not known"),
    ({"use_post_norm": True, "attn_type": "eva"}, "^patch: EvaBlockPostNorm .* is not known"),
    ({"swiglu_mlp": True}, r"^patch: GluMlp \(blocks.0.mlp\) is not known"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(x) for x, _ in REFUSED])
def test_refusals(options: dict, message: str):
    """Guards settings whose results would be wrong."""
    tower = any_pe("vit_pe_lang_gigantic_patch14_448", **options)
    with pytest.raises(ValueError, match=message):
        patch(tower, ["vision_attention"])
    assert not any("pacore_impl" in module.__dict__ for module in tower.modules())


@pytest.mark.parametrize(
    ("place", "attribute", "message"),
    [
        ("rope", "in_pixels", ROTARY + "its positions are in pixels, not patches"),
        ("blocks.0.attn", "gate", ATTENTION + "it has a gate"),
        ("blocks.0.mlp", "fc1", r"linear_quick_gelu does not fit Mlp .*: fc1 is a convolution"),
        ("norm_pre", "bias", r"layer_norm does not fit LayerNorm .*: it has no weight and bias"),
        ("blocks.0.norm2", "normalized_shape", "normalises more than the last axis"),
    ],
)
def test_refusals_of_what_only_other_towers_have(place: str, attribute: str, message: str):
    tower = pe_lang((4, 4))
    values = {"in_pixels": True, "bias": None, "normalized_shape": (4, 8)}
    setattr(tower.get_submodule(place), attribute, values.get(attribute, nn.Conv2d(1, 1, 1)))
    with pytest.raises(ValueError, match=message):
        patch(tower)


def test_refusal_of_the_activation():
    tower = any_pe("vit_pe_lang_gigantic_patch14_448")
    with pytest.raises(
        ValueError,
        match=r"^patch: linear_quick_gelu does not fit Mlp \(blocks.0.mlp\): its activation GELU is"
        " not quick_gelu$",
    ):
        patch(tower)
    with pytest.raises(
        ValueError, match="'projector' applies nowhere in Eva; choose from layer_norm"
    ):
        patch(tower, ["projector"])


@torch.inference_mode()
def test_refusals_at_the_call():
    """Guards masks, which the op does not take, and an attention without its rotation."""
    tower = pe_lang((4, 4))
    patch(tower)
    with pytest.raises(ValueError, match="vision_attention: takes no mask"):
        tower.forward_features(views(1, 4, 4, PATCH), is_causal=True)
    with pytest.raises(ValueError, match="patched, but not the tower's rotary embedding"):
        tower.blocks[0](torch.zeros(1, 16, 32))
