"""Bytes, balance and floors by arithmetic, without a GPU: `python -m bench cost`."""
