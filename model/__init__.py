"""STEP3-VL-10B on the ops of `kernels`: configuration, image and prompt handling, vision tower, decoder, weights."""
