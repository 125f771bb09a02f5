"""Integer arithmetic, without Triton or torch."""


def cdiv(a: int, b: int) -> int:
    """a / b rounded up, for b > 0; of NumPy arrays, element by element."""
    return -(-a // b)
