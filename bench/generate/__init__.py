"""transformers' `generate` over shared pages (`model.hf.generate`) beside its own."""
