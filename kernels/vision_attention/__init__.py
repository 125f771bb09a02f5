"""Attention of the vision tower: each view for itself, queries and keys rotated along two axes."""

from kernels.vision_attention.op import axial_rotary, vision_attention, vision_attention_ref

__all__ = ["axial_rotary", "vision_attention", "vision_attention_ref"]
