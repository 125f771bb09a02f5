"""Integer arithmetic, free of Triton and torch."""


def cdiv(a: int, b: int) -> int:
    """a / b rounded up, for b > 0; elementwise for NumPy arrays."""
    return -(-a // b)
