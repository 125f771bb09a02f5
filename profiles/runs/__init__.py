"""Measuring tasks, the worker processes that run them, and their supervisor."""
