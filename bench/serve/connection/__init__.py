"""Requests over HTTP: the server, the client, and what it has seen."""
