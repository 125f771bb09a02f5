"""The commands of `python -m pacore_sched`, and what they share."""
