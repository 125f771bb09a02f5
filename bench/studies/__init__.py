"""Longer experiments: decode steps, whole answers, the engine, single questions of precision."""
