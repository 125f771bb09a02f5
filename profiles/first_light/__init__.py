"""The first minutes on a GPU: the run, its summary, and what its rows say to do next."""
