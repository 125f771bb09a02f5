"""Helpers that tests share: prefix trees, fakes, scripts that run in a separate process."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the checkout
