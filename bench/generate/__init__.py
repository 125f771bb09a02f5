"""transformers' `generate` over shared pages (`model.hf.generate`), next to its own."""
