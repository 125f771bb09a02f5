"""Profilers, supervised measuring runs, and the committed rows (`profiles/results/<machine>/`)."""
