"""Attention of the vision tower: bidirectional within each view, with axial 2-D rotary."""

from kernels.vision_attention.op import axial_rotary, vision_attention, vision_attention_ref

__all__ = ["axial_rotary", "vision_attention", "vision_attention_ref"]
