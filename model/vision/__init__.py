"""Images: their views, the vision tower, and what is kept of its work."""
