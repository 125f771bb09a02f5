"""Reading images: from a file, bytes, an array or a PIL image to upright 8-bit RGB pixels."""
