"""What the fused softplus kernels compute per score: softplus, its slope, the excess over the threshold, its power.

All in fp32, from the fp32 product of queries and keys. Rows' values come ready to broadcast, [M, 1] or [1, M].
"""

from __future__ import annotations

import triton
import triton.language as tl

from farspan.kernels.softplus import config

LOG2E = tl.constexpr(1.4426950408889634)
DEAD = tl.constexpr(config.DEAD)

# ln(1 + t) / t on [0, 1], the polynomial of degree 8 with the least relative error: 3e-8, in fp32 2e-7 at any t. The
# logarithm of 1 + t instead would lose the digits of small t: a relative error of 1 at z = -17.
SERIES = tuple(
    tl.constexpr(coefficient)
    for coefficient in (
        0.9999999403953552,
        -0.4999949336051941,
        0.3331909775733948,
        -0.2484298199415207,
        0.19106008112430573,
        -0.13663245737552643,
        0.07822594791650772,
        -0.029505228623747826,
        0.005232690833508968,
    )
)


@triton.jit
def softplus(z, SERIES: tl.constexpr = SERIES):
    """ln(1 + e^z), to fp32 rounding at both ends; and e^-|z|."""
    small = tl.exp2(tl.abs(z) * -LOG2E)
    series = SERIES[8]
    for i in tl.static_range(8):
        series = series * small + SERIES[7 - i]
    return tl.maximum(z, 0.0) + small * series, small


@triton.jit
def sigmoid(z, small):
    """The slope of softplus, from z and e^-|z|."""
    return tl.where(z >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def thresholds(total, largest, counts, free_rows):
    """theta, 1 / rho (below 0 in dead rows), and in which rows theta is the mean; from S = sum f and the largest f.

    A dead row has no direction: its scores are equal to rounding. It is handled without threshold and power.
    """
    theta = tl.where(counts > free_rows, total / counts, 0.0)
    dead = largest - theta <= largest * DEAD
    theta = tl.where(dead, 0.0, theta)
    rho = tl.where(total == total, largest - theta, total)  # tl.max passes over NaN; it has to show
    inverse = reciprocal(rho)
    return theta, tl.where(dead, -inverse, inverse)


@triton.jit
def reciprocal(x):
    """1 / x; 0 where x, a sum or maximum of f, underflows: with a scale multiplier every score of a row may be -90."""
    return tl.where(x < 1e-36, 0.0, 1.0 / x)


@triton.jit
def excess(f, theta, inverse):
    """max(f - theta, 0) times 1 / rho (or g); 0 where f is, so that hidden keys stay hidden."""
    return tl.maximum(f - theta, 0.0) * tl.abs(inverse)


@triton.jit
def weights(u, inverse, power, EXPONENT: tl.constexpr):
    """u^p, and u itself in dead rows."""
    return tl.where(inverse < 0, u, raised(u, power, EXPONENT))


@triton.jit
def slopes(u, inverse, power, EXPONENT: tl.constexpr):
    """u^(p-1) for u above 0, in dead rows 1; 0 for u = 0."""
    if EXPONENT == 1:
        return raised(u, power, 0)
    return tl.where(inverse < 0, raised(u, power, 0), raised(u, power - 1.0, EXPONENT - 1))


@triton.jit
def raised(u, power, EXPONENT: tl.constexpr):
    """u^EXPONENT by squaring, below 256; u^power for a negative EXPONENT; 0^0 is 0."""
    if EXPONENT < 0:
        return tl.where(u == 0, 0.0, tl.exp2(power * tl.log2(tl.where(u == 0, 1.0, u))))
    if EXPONENT == 0:
        return tl.where(u == 0, 0.0, 1.0)
    result = u
    for i in tl.static_range(8):
        if (EXPONENT >> (8 - i)) > 0:
            result = result * result
            if ((EXPONENT >> (7 - i)) & 1) == 1:
                result = result * u
    return result
