"""Requests to /v1/responses: a second form of chat, which runs as a chat request."""
