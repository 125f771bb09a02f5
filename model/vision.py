"""The vision side: PE-lang tower, then the projector that gives the decoder 16 times fewer tokens.

Views of different sizes run as one packed batch: every linear layer sees all tokens of all views,
attention and convolutions see each view by itself.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels._views import Grid
from kernels.activation import quick_gelu
from kernels.norm import layer_norm
from kernels.projector import projector
from kernels.vision_attention import vision_attention
from model.config import VisionConfig


class VisionTower(nn.Module):
    """Patch embedding, position embedding, ln_pre, blocks, two downsamplers and the projector."""

    def __init__(
        self,
        config: VisionConfig,
        out_width: int,
        *,
        impl: dict[str, str | None],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.config, self.impl = config, impl

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

        def kernel(*shape: int) -> nn.Parameter:
            # Channels-last, the layout that the tokens already have.
            tensor = weight(*shape).data.to(memory_format=torch.channels_last)
            return nn.Parameter(tensor, requires_grad=False)

        c = config.width
        self.patch_embedding = weight(c, 3, config.patch_size, config.patch_size)
        self.positional_embedding = weight(config.grid**2, c)
        self.ln_pre = _LayerNorm(c, weight)
        self.blocks = nn.ModuleList(_Block(config, weight) for _ in range(config.layers))
        self.downsampler1, self.bias1 = kernel(2 * c, c, 3, 3), weight(2 * c)
        self.downsampler2, self.bias2 = kernel(4 * c, 2 * c, 3, 3), weight(4 * c)
        self.projector = weight(out_width, 4 * c)

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """Encode views [3, side, side] of any sizes to decoder embeddings [T', out_width].

        The result holds each view's tokens in the order of the views, row-major within a view.
        """
        x, grids = self.patches(views)
        return projector(
            self.tower(x, grids),
            grids,
            self.downsampler1,
            self.bias1,
            self.downsampler2,
            self.bias2,
            self.projector,
            impl=self.impl["projector"],
        )

    def patches(self, views: Sequence[Tensor]) -> tuple[Tensor, list[Grid]]:
        """Embedded patches of all views, packed [T, width], and each view's grid."""
        tokens, grids, size = [], [], self.config.patch_size
        for (_, height, width), same in groupby(views, key=lambda view: view.shape):
            batch = torch.stack(list(same)).to(self.patch_embedding)
            grid = (height // size, width // size)
            embedded = F.conv2d(batch, self.patch_embedding, stride=size)
            embedded = embedded.flatten(2).transpose(1, 2) + self._positions(grid)
            tokens.append(embedded.flatten(0, 1))
            grids += [grid] * len(batch)
        x = torch.cat(tokens) if tokens else self.positional_embedding[:0]
        return x, grids

    def tower(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        """ln_pre and the blocks on packed embedded patches [T, width].

        Each sub-layer's LayerScale and residual sum are folded into the next layer norm.
        """
        x = self._norm(x, self.ln_pre)
        branch, gamma = None, None
        for block in self.blocks:
            if branch is None:
                h = self._norm(x, block.ln_1)
            else:
                h, x = self._norm(branch, block.ln_1, x, gamma)
            branch = self._attention(h, block, grids)
            h, x = self._norm(branch, block.ln_2, x, block.ls_1)
            branch, gamma = self._mlp(h, block), block.ls_2
        return x + branch * gamma

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Published name -> this module's storage."""
        tensors = {
            "vision_model.conv1.weight": self.patch_embedding,
            "vision_model.positional_embedding": self.positional_embedding,
            "vision_model.ln_pre.weight": self.ln_pre.weight,
            "vision_model.ln_pre.bias": self.ln_pre.bias,
        }
        for index, block in enumerate(self.blocks):
            for name, tensor in block.checkpoint_tensors():
                tensors[f"vision_model.transformer.resblocks.{index}.{name}"] = tensor
        return tensors | {
            "vision_model.vit_downsampler1.weight": self.downsampler1,
            "vision_model.vit_downsampler1.bias": self.bias1,
            "vision_model.vit_downsampler2.weight": self.downsampler2,
            "vision_model.vit_downsampler2.bias": self.bias2,
            "vit_large_projector.weight": self.projector,
        }

    def _norm(
        self,
        x: Tensor,
        norm: "_LayerNorm",
        residual: Tensor | None = None,
        gamma: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        eps, impl = self.config.norm_eps, self.impl["layer_norm"]
        return layer_norm(
            x, norm.weight, norm.bias, eps=eps, residual=residual, gamma=gamma, impl=impl
        )

    def _attention(self, h: Tensor, block: "_Block", grids: Sequence[Grid]) -> Tensor:
        out = vision_attention(
            F.linear(h, block.qkv, block.qkv_bias),
            grids,
            heads=self.config.heads,
            theta=self.config.rope_theta,
            impl=self.impl["vision_attention"],
        )
        return F.linear(out, block.out, block.out_bias)

    def _mlp(self, h: Tensor, block: "_Block") -> Tensor:
        h = quick_gelu(F.linear(h, block.fc, block.fc_bias), impl=self.impl["quick_gelu"])
        return F.linear(h, block.proj, block.proj_bias)

    def _positions(self, grid: Grid) -> Tensor:
        """The position embedding at a view's grid, [tokens, width], in the parameter's dtype.

        Raises ValueError for a grid with a side of 0 or of more patches than the global view.
        """
        side = self.config.grid
        if not all(0 < n <= side for n in grid):
            raise ValueError(f"a view of {grid[0]} x {grid[1]} patches: sides must be 1 to {side}")
        if grid == (side, side):
            return self.positional_embedding
        table = self.positional_embedding.view(1, side, side, -1).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=grid, mode="bilinear", align_corners=False)
        return table.flatten(2)[0].T


class _LayerNorm(nn.Module):
    def __init__(self, width: int, weight: Callable[..., nn.Parameter]) -> None:
        super().__init__()
        self.weight, self.bias = weight(width), weight(width)


class _Block(nn.Module):
    """The weights of one block of the tower."""

    def __init__(self, config: VisionConfig, weight: Callable[..., nn.Parameter]) -> None:
        super().__init__()
        c, hidden = config.width, config.mlp_width
        self.ln_1, self.ln_2 = _LayerNorm(c, weight), _LayerNorm(c, weight)
        self.qkv, self.qkv_bias = weight(3 * c, c), weight(3 * c)
        self.out, self.out_bias = weight(c, c), weight(c)
        self.fc, self.fc_bias = weight(hidden, c), weight(hidden)
        self.proj, self.proj_bias = weight(c, hidden), weight(c)
        self.ls_1, self.ls_2 = weight(c), weight(c)

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "attn.in_proj_weight", self.qkv
        yield "attn.in_proj_bias", self.qkv_bias
        yield "attn.out_proj.weight", self.out
        yield "attn.out_proj.bias", self.out_bias
        for name, norm in (("ln_1", self.ln_1), ("ln_2", self.ln_2)):
            yield f"{name}.weight", norm.weight
            yield f"{name}.bias", norm.bias
        yield "mlp.c_fc.weight", self.fc
        yield "mlp.c_fc.bias", self.fc_bias
        yield "mlp.c_proj.weight", self.proj
        yield "mlp.c_proj.bias", self.proj_bias
        yield "ls_1.gamma", self.ls_1
        yield "ls_2.gamma", self.ls_2
