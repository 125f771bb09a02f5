"""The commands of `python -m pacore_sched` and the code that they share."""
