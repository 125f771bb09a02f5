"""Gumbel noise in Triton: Philox words, -log(-log1p(-u)) of them, and the arg-max of z + noise.

Inline assembly and libdevice, and with them log1p and the hardware's fast logarithm, are out of
bounds here (the interpreter has neither), so both logarithms are written out.
"""

import triton
import triton.language as tl


@triton.jit
def log1p(f, exponent):
    """log(2^exponent * (1 + f)) for |f| <= 1/3, within 2 ulp; the exponent comes times 2^23.

    The polynomial is the minimax one of (log(1 + f) - f) / f^2; without cancellation if exponent
    is 0 or f > -1/4, as `gumbel` has it, so that the error is relative down to f = 0.
    """
    p = tl.fma(f, -0.130187988, 0.140889585)
    p = tl.fma(p, f, -0.121489234)
    p = tl.fma(p, f, 0.139809728)
    p = tl.fma(p, f, -0.166845724)
    p = tl.fma(p, f, 0.200120553)
    p = tl.fma(p, f, -0.249996692)
    p = tl.fma(p, f, 0.333331853)
    p = tl.fma(p, f, -0.5)
    p = tl.fma(f * p, f, f)
    return tl.fma(exponent.to(tl.float32), 0.693147182 * 2.0**-23, p)


@triton.jit
def gumbel(words):
    """-log(-log1p(-u)) of random words, without a subnormal or an infinity on the way."""
    u = tl.minimum((words.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    # 1 - u = 2^e (1 + f) with 1 + f in [2/3, 4/3): f = -u itself if e is 0, as it is for small u.
    exponent = ((1 - u).to(tl.int32, bitcast=True) - 0x3F2AAAAB) & -0x800000
    scale = (0x3F800000 - exponent).to(tl.float32, bitcast=True)
    wait = -log1p(tl.fma(-u, scale, scale - 1), exponent)
    bits = wait.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -0x800000
    return -log1p((bits - exponent).to(tl.float32, bitcast=True) - 1, exponent)


@triton.jit
def rough_gumbel(words):
    """`gumbel` to a factor of a third of its cost: an upper bound, and how far it may be above.

    The logarithm of u is the bits of u and a cubic of its mantissa, within 0.0005; the rest, up to
    u = 1/2, a square within 0.0015, and below the truth from there on, where it hardly matters:
    noise so low wins only where little else is likely.
    """
    x = words.to(tl.float32) + 0.5  # 2^32 u
    bits = x.to(tl.int32, bitcast=True)
    m = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)  # in [1, 2)
    high = tl.fma(tl.fma(tl.fma(m, -0.109690386, 0.729107527), m, -1.419489881), m, 111.0120)
    high = tl.fma(bits.to(tl.float32), -0.6931471805599453 * 2.0**-23, high)
    high = tl.fma(tl.fma(x, -0.355865470 * 2.0**-64, -0.472494112 * 2.0**-32), x, high)
    return high, tl.where(x < 2.0**31, 0.0042, 2.0)


@triton.jit
def random_words(seed, position, quads):
    """The random words of tokens 4 * quads .. 4 * quads + 3, uint32 [4 * len(quads)].

    `tl.philox`, but for products of 64 bits: one instruction gives both halves.
    """
    c0, c2 = (
        quads.to(tl.uint32),
        tl.zeros_like(quads).to(tl.uint32) + (position >> 32).to(tl.uint32),
    )
    c1, c3 = tl.zeros_like(c0) + position.to(tl.uint32), tl.zeros_like(c0)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        product0, product2 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product2 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = product2.to(tl.uint32), product0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))  # [quads, 2, 2]: c0, c1, c2, c3 in order
    return tl.reshape(words, [4 * quads.shape[0]])


@triton.jit
def perturbed_argmax(z, words, tokens, nothing):
    """Which of `tokens` has the largest z + gumbel(words): the first on ties, `nothing` for NaN.

    Noise is most of the work of a draw, and almost always one token is ahead by more than the
    rough noise is wrong. Otherwise all of it is computed as the definition has it.
    """
    high, slack = rough_gumbel(words)
    high += z
    likely = high >= tl.max(high - slack, axis=0)
    first = tl.min(tl.where(likely, tokens, nothing), axis=0)
    if first != tl.max(tl.where(likely, tokens, -1), axis=0):
        scores = z + gumbel(words)
        best = tl.max(scores, axis=0)
        first = tl.min(tl.where(scores == best, tokens, nothing), axis=0)
    return first
