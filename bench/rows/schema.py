"""Rows: their fields and the version of their meaning."""

SCHEMA = 1
