"""`python -m bench serve`: load on an HTTP server with OpenAI's interface, ours or another."""
