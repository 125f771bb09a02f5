"""STEP3-VL-10B built on the ops of `kernels`: config, images, prompts, tower, decoder, weights."""
