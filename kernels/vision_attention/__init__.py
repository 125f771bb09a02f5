"""Attention of the vision tower: rotated on the fly, each view for itself."""

from kernels.vision_attention.op import (
    axial_rotary,
    vision_attention,
    vision_attention_portable,
    vision_attention_ref,
)

__all__ = [
    "axial_rotary",
    "vision_attention",
    "vision_attention_portable",
    "vision_attention_ref",
]
