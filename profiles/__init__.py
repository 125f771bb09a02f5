"""Profiling drivers and the recorded rows of every GPU measured (`profiles/results/<gpu>/`)."""
