"""Measuring: the timer, the roofline, verdicts on results, the table of ops."""
