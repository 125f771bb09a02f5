"""The engine: runs the scheduler's steps on a model, by CUDA graphs on a GPU."""
