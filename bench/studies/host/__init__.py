"""What the host costs: launches, and calls through PyTorch's dispatcher."""
