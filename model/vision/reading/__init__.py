"""From what a caller has (a file, bytes, an array, a PIL image) to upright 8-bit RGB pixels."""
