"""The scheduler: requests, the prefix tree of their KV, and policies. Does not import torch."""
