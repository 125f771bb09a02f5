"""Rows of results: their fields, files and tables. Imports neither torch nor `kernels`."""
