"""Benchmarks: cases as data, one timer, the measured roofline, and end-to-end runs."""
