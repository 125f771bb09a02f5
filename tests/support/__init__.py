"""What tests share: plans and prefix trees, stand-ins, and processes of their own."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the checkout
