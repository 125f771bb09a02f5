"""Several replicas of the model on Ray."""
