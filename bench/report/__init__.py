"""Rows as one HTML page and pictures: `python -m bench report`."""
