"""Runs of many tasks, each in a process that a supervisor watches."""
