"""The generated tables of README and docs/, from the committed rows."""
