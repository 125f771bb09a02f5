"""What is sent: workloads of equal seeds are equal."""
