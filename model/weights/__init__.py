"""Sources of weights: safetensors checkpoints, GGUF files, random initialisation."""
