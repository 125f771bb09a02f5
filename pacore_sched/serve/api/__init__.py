"""The bodies of requests and responses, in OpenAI's form."""
