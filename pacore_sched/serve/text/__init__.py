"""The text of a rollout while it is generated."""
