"""Tests of the stress test."""
