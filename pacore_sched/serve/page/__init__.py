"""The page at `/` that shows a running server, and `/status`, the numbers that it draws."""
