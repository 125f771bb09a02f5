"""`python -m bench compare`: slow-downs between two commits or two files of rows."""
