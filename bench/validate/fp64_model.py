"""The whole model in fp64, from its checkpoint's tensors and formulas: a judge without rounding.

One sequence, one view at a time, nothing packed, fused, paged or folded. With `keep` every result
that the model stores is passed through it: rounding to 16 bits there, and nowhere else, shows what
a dtype by itself costs, however well everything is computed.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.validate.fp64 import (
    attention,
    axial_turned,
    convolved,
    half_turned,
    layer,
    logistic,
    rms,
)
from model.config import Config
from model.step3vl import Step3VL

Keep = Callable[[Tensor], Tensor]


def rounding_to(dtype: torch.dtype) -> Keep:
    """Rounds results to `dtype`, and stays in fp64."""
    return lambda x: x.to(dtype).double()


class Exact:
    """A model's fp64 twin on the CPU; it holds the weights' values as they are."""

    def __init__(self, model: Step3VL, keep: Keep = lambda x: x) -> None:
        self.config: Config = model.config
        self.weights = {n: x.cpu().double() for n, x in model.checkpoint_tensors().items()}
        self.keep = keep

    @torch.inference_mode()
    def logits(self, ids: Tensor, views: Sequence[Tensor] = ()) -> Tensor:
        """Logits [T, vocab] of ids whose `<im_patch>` ones stand for the tokens of `views`."""
        x = self.weights["model.embed_tokens.weight"][ids.cpu()]
        if views:
            x[ids.cpu() == self.config.tokens.im_patch] = self.features(views)
        for index in range(self.config.decoder.layers):
            x = self._decoder_layer(x, f"model.layers.{index}")
        head = self.weights["lm_head.weight"]
        return self.keep(self._rms(x, "model.norm") @ head.T)

    @torch.inference_mode()
    def features(self, views: Sequence[Tensor]) -> Tensor:
        """Decoder embeddings [T', hidden] of views [3, height, width]."""
        return torch.cat([self._projected(*self._tower(view)) for view in views])

    @torch.inference_mode()
    def tokens(self, view: Tensor) -> Tensor:
        """What the tower makes of a view, before it is downsampled: [rows * columns, width]."""
        return self._tower(view)[0]

    def _decoder_layer(self, x: Tensor, name: str) -> Tensor:
        decoder = self.config.decoder
        dim, places = decoder.head_dim, torch.arange(len(x))
        inv_freq = decoder.rope_theta ** -(torch.arange(0, dim, 2).float() / dim)
        h = self._rms(x, f"{name}.input_layernorm")
        q, k, v = (
            self._linear(h, f"{name}.self_attn.{part}_proj").unflatten(1, (-1, dim))
            for part in "qkv"
        )
        q = self.keep(half_turned(self._rms(q, f"{name}.self_attn.q_norm"), places, inv_freq))
        k = self.keep(half_turned(self._rms(k, f"{name}.self_attn.k_norm"), places, inv_freq))
        seen = places <= places[:, None]
        out = self.keep(attention(q, k, v, dim**-0.5, seen)[0].flatten(1))
        x = self.keep(x + self._linear(out, f"{name}.self_attn.o_proj"))
        h = self._rms(x, f"{name}.post_attention_layernorm")
        gate, up = (self._linear(h, f"{name}.mlp.{part}_proj") for part in ("gate", "up"))
        h = self.keep(self.keep(gate * logistic(gate)) * up)
        return self.keep(x + self._linear(h, f"{name}.mlp.down_proj"))

    def _tower(self, view: Tensor) -> tuple[Tensor, tuple[int, int]]:
        vision, weights = self.config.vision, self.weights
        pixels, kernel = view.cpu().double(), weights["vision_model.conv1.weight"]
        patches = F.conv2d(pixels[None], kernel, stride=vision.patch_size)[0]
        grid = tuple(patches.shape[1:])
        places = weights["vision_model.positional_embedding"].T.unflatten(1, (vision.grid,) * 2)
        places = F.interpolate(places[None], size=grid, mode="bilinear", align_corners=False)[0]
        x = self.keep((self.keep(patches) + self.keep(places)).flatten(1).T)
        x = self._layer(x, "vision_model.ln_pre")
        for index in range(vision.layers):
            x = self._vision_block(x, grid, f"vision_model.transformer.resblocks.{index}")
        return x, grid

    def _vision_block(self, x: Tensor, grid: tuple[int, int], name: str) -> Tensor:
        vision, weights = self.config.vision, self.weights
        weight, bias = (weights[f"{name}.attn.in_proj_{kind}"] for kind in ("weight", "bias"))
        qkv = self.keep(self._layer(x, f"{name}.ln_1") @ weight.T + bias)
        q, k, v = qkv.view(len(x), 3, vision.heads, -1).unbind(1)
        q, k = (self.keep(axial_turned(part, grid, vision.rope_theta)) for part in (q, k))
        out = self.keep(attention(q, k, v, q.shape[-1] ** -0.5)[0].flatten(1))
        x = self.keep(
            x + self._linear(out, f"{name}.attn.out_proj") * weights[f"{name}.ls_1.gamma"]
        )
        h = self._linear(self._layer(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        h = self._linear(self.keep(h * logistic(1.702 * h)), f"{name}.mlp.c_proj")
        return self.keep(x + h * weights[f"{name}.ls_2.gamma"])

    def _projected(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        image = x.T.unflatten(1, grid)
        for number in (1, 2):
            name = f"vision_model.vit_downsampler{number}"
            weight, bias = (self.weights[f"{name}.{kind}"] for kind in ("weight", "bias"))
            image = self.keep(convolved(image, weight, bias))
        return self.keep(image.flatten(1).T @ self.weights["vit_large_projector.weight"].T)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        bias = self.weights.get(f"{name}.bias")
        product = x @ self.weights[f"{name}.weight"].T
        return self.keep(product if bias is None else product + bias)

    def _rms(self, x: Tensor, name: str) -> Tensor:
        return self.keep(rms(x, self.weights[f"{name}.weight"], self.config.decoder.norm_eps))

    def _layer(self, x: Tensor, name: str) -> Tensor:
        weight, bias = (self.weights[f"{name}.{kind}"] for kind in ("weight", "bias"))
        return self.keep(layer(x, weight, bias, self.config.vision.norm_eps))
