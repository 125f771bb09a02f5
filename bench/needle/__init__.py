"""Needle test: whether a model finds facts in a long text, within and beyond its context."""
