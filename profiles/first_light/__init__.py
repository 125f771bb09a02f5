"""The first minutes on a GPU: what to run, what came of it, what to do next."""
