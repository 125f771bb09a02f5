"""Stress test of the scheduler and the engine: random events on a model of hashes."""
