"""timm's PE-lang vision tower with this model's activation: an independent judge of the blocks.

timm has neither the downsamplers nor the projector, and differs from this model in three points
that `pe_lang` and `load` correct:
- its MLP applies the exact GELU, this model quick_gelu;
- it rescales rotary positions to its training grid, this model uses patch indices;
- it resamples the position embedding bicubically, this model bilinearly.
"""

from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.validate.torchvision_stub import torchvision_or_stub
from bench.validate.transformers_judge import like
from model.step3vl import Step3VL


@cache
def _eva() -> ModuleType:
    """timm's module with this model; imported late because that takes seconds."""
    with torchvision_or_stub():
        from timm.models import eva
    return eva


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def pe_lang(
    width: int, depth: int, heads: int, mlp_width: int, grid: tuple[int, int], *, patch: int = 14
) -> nn.Module:
    """timm's `Eva` for views of `grid` = (rows, cols) patches, in eval mode, randomly initialised.

    Its `forward_features` maps [N, 3, rows*patch, cols*patch] to [N, rows*cols, width] and stops
    before the downsamplers. Raises ValueError for a `mlp_width` that timm would round.
    """
    model = _eva().vit_pe_lang_gigantic_patch14_448(
        img_size=(grid[0] * patch, grid[1] * patch),
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp_width / width,
        ref_feat_shape=grid,  # the same grid: positions are not rescaled
        num_classes=0,
    )
    for block in model.blocks:
        if block.mlp.fc1.out_features != mlp_width:
            raise ValueError(f"timm rounds mlp_width {mlp_width} to {block.mlp.fc1.out_features}")
        block.mlp.act = QuickGELU()
    return model.eval()


def load(
    model: Any,  # noqa: ANN401 -- timm declares no types
    tensors: Mapping[str, Tensor],
    base_grid: tuple[int, int],
) -> None:
    """Copy a checkpoint's vision tower, by its published names, into a model from `pe_lang`.

    Takes the names below `vision_model.` except the downsamplers. The position embedding of
    `base_grid` [rows*cols, width] is resized to the model's own grid.
    """
    prefix, skipped = "vision_model.", "vision_model.vit_downsampler"
    tower = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not name.startswith(skipped)
    }
    tower["positional_embedding"] = _resize(
        tower["positional_embedding"], base_grid, model.patch_embed.grid_size
    )
    model.load_state_dict(_eva().checkpoint_filter_fn(tower, model), strict=True)


@torch.inference_mode()
def tokens(model: Step3VL, view: Tensor, impl: str | None = None) -> Tensor:
    """The expected output of our vision tower's blocks for a view: [rows * cols, width].

    impl: if given, timm computes with our ops in this implementation (`model.hf.patch`)
    Raises ImportError without timm.
    """
    assert model.vision is not None
    vision = model.vision.config
    grid = (view.shape[1] // vision.patch_size, view.shape[2] // vision.patch_size)
    judge = pe_lang(
        vision.width, vision.layers, vision.heads, vision.mlp_width, grid, patch=vision.patch_size
    )
    load(judge, model.vision.checkpoint_tensors(), (vision.grid, vision.grid))
    return like(model, judge, impl).forward_features(view[None])[0]


def _resize(embedding: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    image = embedding.reshape(1, *grid, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new_grid, mode="bilinear", align_corners=False)
    return image.flatten(2)[0].T
