"""Images: preprocessing into views, the vision tower, its CUDA graphs and embedding cache."""
