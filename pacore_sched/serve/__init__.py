"""The HTTP server: PaCoRe and chat completions in OpenAI's interface."""
