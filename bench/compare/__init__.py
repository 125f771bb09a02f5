"""Two commits, or two files of rows: what has become slower: `python -m bench compare`."""
