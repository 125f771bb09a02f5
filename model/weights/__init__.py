"""Where weights come from: checkpoints of safetensors, GGUF files, random numbers."""
