"""The HTTP server on several replicas, with Ray Serve."""
