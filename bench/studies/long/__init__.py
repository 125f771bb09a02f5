"""Studies of contexts beyond what models are trained on."""
