"""The commands of `python -m bench`: their options, and what they share."""
