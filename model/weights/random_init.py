"""Random initialisation of weights, determined by the seed and each tensor's published name alone.

This is not a training recipe. The scales keep activations of order 1 at any depth and width, and
every tensor affects the output, so that a test notices a dropped or misplaced weight.
"""

import hashlib

import torch
from torch import Tensor

_CHUNK = 2**24  # elements drawn at a time: 64 MiB of fp32


@torch.no_grad()
def random_init(tensors: dict[str, Tensor], seed: int, *, layer_scale: float = 0.1) -> None:
    """Fill `tensors` (published name -> tensor) in place, each on its own device.

    - Matrices, convolutions and embeddings: normal with std 1/sqrt(fan_in). A linear layer then
      keeps the scale of its input at any width; a constant 0.02 would gain 1.3 per layer at width
      4096 and lose 3 at 256. Pre-norm blocks add O(1) each, so the residual stream grows only as
      the square root of the depth.
    - Norm weights 1, LayerScale `layer_scale`, biases 0, each plus a tenth at random: exact ones
      and zeros would hide a forgotten tensor.

    Values are drawn in fp32 and rounded, so models of different dtypes hold the same weights; CPU
    and CUDA draw different ones. Raises ValueError for a name that no rule covers.
    """
    for name, tensor in tensors.items():
        mean, std = _distribution(name, tensor, layer_scale)
        generator = torch.Generator(tensor.device).manual_seed(_tensor_seed(seed, name))
        for rows in tensor.split(max(1, _CHUNK // tensor[0].numel())):
            draw = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
            rows.copy_(draw.normal_(mean, std, generator=generator))


def _distribution(name: str, tensor: Tensor, layer_scale: float) -> tuple[float, float]:
    """Mean and standard deviation of the tensor called `name`."""
    if tensor.ndim > 1:
        return 0.0, tensor[0].numel() ** -0.5
    if name.endswith("bias"):
        return 0.0, 0.1
    if name.endswith(".gamma"):
        return layer_scale, 0.1 * layer_scale
    if name.endswith(".weight"):  # the only weights that are vectors are those of norms
        return 1.0, 0.1
    raise ValueError(
        f"no rule to initialise {name} {list(tensor.shape)}:"
        " a vector's name must end in bias, .gamma or .weight"
    )


def _tensor_seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % 2**63
