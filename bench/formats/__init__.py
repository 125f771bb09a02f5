"""Rows in the formats of other projects, and shapes from request traces. Imports no torch."""
