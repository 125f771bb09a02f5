"""Shared code of ops: choice of impl, kernel configs, cached tensors, copies to the GPU, spans."""
