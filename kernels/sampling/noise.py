"""Gumbel noise in Triton: Philox words, their -log(-log1p(-u)), and the argmax of z + noise.

Triton's interpreter has neither inline assembly nor libdevice, and so neither log1p nor the
hardware's fast logarithm: both logarithms are written out here.
"""

import triton
import triton.language as tl


@triton.jit
def log1p(f, exponent):
    """log(2^e * (1 + f)) for |f| <= 1/3, within 2 ulp; exponent: e * 2^23.

    A minimax polynomial of (log(1 + f) - f) / f^2. There is no cancellation if e is 0 or f > -1/4,
    as in `gumbel`, so the error is relative down to f = 0.
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
    """-log(-log1p(-u)) of random words; no intermediate value is subnormal or infinite."""
    u = tl.minimum((words.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    # 1 - u = 2^e (1 + f) with 1 + f in [2/3, 4/3); for small u, e is 0 and f is exactly -u.
    exponent = ((1 - u).to(tl.int32, bitcast=True) - 0x3F2AAAAB) & -0x800000
    scale = (0x3F800000 - exponent).to(tl.float32, bitcast=True)
    variate = -log1p(tl.fma(-u, scale, scale - 1), exponent)
    bits = variate.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -0x800000
    return -log1p((bits - exponent).to(tl.float32, bitcast=True) - 1, exponent)


@triton.jit
def rough_gumbel(words):
    """An upper bound of `gumbel` at a third of its cost, and how far above the bound may be.

    log(u) is computed from the bits of u and a cubic polynomial of its mantissa, within 0.0005. The
    remainder is a quadratic, within 0.0015 up to u = 1/2 and below the true value from there on,
    where it hardly matters: noise that low wins only where few tokens are likely.
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

    As `tl.philox`, but with 64-bit products, so that one instruction gives both halves.
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
def perturbed_argmax(z, words, tokens, default):
    """The token with the largest z + gumbel(words): the first on ties, `default` for NaN.

    Noise is most of the work of a draw, and almost always one token leads by more than the error of
    the rough noise. Otherwise the exact noise is computed for all tokens.
    """
    high, slack = rough_gumbel(words)
    high += z
    likely = high >= tl.max(high - slack, axis=0)
    first = tl.min(tl.where(likely, tokens, default), axis=0)
    if first != tl.max(tl.where(likely, tokens, -1), axis=0):
        scores = z + gumbel(words)
        best = tl.max(scores, axis=0)
        first = tl.min(tl.where(scores == best, tokens, default), axis=0)
    return first
