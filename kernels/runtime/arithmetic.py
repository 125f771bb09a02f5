"""Integer arithmetic, free of Triton and torch."""

INT32_END = 2**31  # the first integer past those of int32


def cdiv(a: int, b: int) -> int:
    """a / b rounded up, for b > 0; elementwise for NumPy arrays."""
    return -(-a // b)
