"""STEP3-VL-10B on the ops of `kernels`: configuration, images, prompts, tower, decoder, weights."""
