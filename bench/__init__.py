"""Measurements: cases as data, one timer, the machine's roofline, and the end-to-end job."""
