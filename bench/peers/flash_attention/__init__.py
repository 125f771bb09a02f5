"""FlashAttention 2 and 3, from the shared objects in vLLM's wheel or from their own packages."""
