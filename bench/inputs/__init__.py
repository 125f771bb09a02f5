"""What inputs of several ops are made of: random numbers, prefix trees, views of images."""
