"""`python -m bench replicas`: what several replicas on Ray gain, survive and cost."""
