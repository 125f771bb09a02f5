"""Simulated images: what their views cost in the vision tower, and when they are encoded."""
