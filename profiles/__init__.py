"""Profiling drivers and the recorded rows of every GPU measured so far (`profiles/results/<gpu>/`)."""
