"""The scheduler: requests, the prefix tree of their KV, policies. Nothing here imports torch."""
