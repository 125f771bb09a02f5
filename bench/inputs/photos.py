"""Random photos, as encoded files."""

import io
import random


def jpeg(draw: random.Random, size: tuple[int, int]) -> bytes:
    """A JPEG of random soft shapes: its size as a file is like that of a photo, not of noise."""
    from PIL import Image

    small = Image.frombytes("RGB", (16, 16), draw.randbytes(16 * 16 * 3))
    file = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()
