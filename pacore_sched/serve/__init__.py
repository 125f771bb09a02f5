"""The HTTP server: PaCoRe and chat completions behind OpenAI's interface."""
