"""The likelihoods of one element: -log p(x) and its derivatives, as in reference.py.

``LIKELIHOOD`` is the index in ("gaussian", "laplace", "bernoulli", "logistic", "student_t",
"squared_error"). What the formulas of value and derivatives share is written in both: the compiler
makes it once.
"""

import math

import triton
import triton.language as tl

from .elementary import exp, exp_rest, log1p, sigmoid, softplus
from .scale import divide

GAUSSIAN = tl.constexpr(0)
LAPLACE = tl.constexpr(1)
BERNOULLI = tl.constexpr(2)
LOGISTIC = tl.constexpr(3)
STUDENT_T = tl.constexpr(4)
SQUARED_ERROR = tl.constexpr(5)

WITHOUT_SCALE = (BERNOULLI.value, SQUARED_ERROR.value)
# How often a thread's elements must be halved for the registers that a likelihood needs.
HEAVY = {LOGISTIC.value: 2, STUDENT_T.value: 1}

LOG_2 = tl.constexpr(math.log(2.0))
LOG_2PI = tl.constexpr(math.log(2.0 * math.pi))


@triton.jit
def element_nll(x, mean, log_variance, root, tau, df, constant, x_mul, x_add,
                LIKELIHOOD: tl.constexpr, PARAM: tl.constexpr, APPROX: tl.constexpr):  # fmt: skip
    """-log p(x).

    Args:
        log_variance, root, tau: of ``log_variance_and_divisor``; not used where there is no scale.
        df, constant: of Student's t.
        x_mul, x_add: the levels that logistic bins are around.
    """
    if LIKELIHOOD == GAUSSIAN:
        residual = divide(x - mean, root, tau, PARAM)
        # Half of r, not of r², which may overflow.
        return 0.5 * residual * residual + (0.5 * log_variance + 0.5 * LOG_2PI)
    elif LIKELIHOOD == LAPLACE:
        return tl.abs(divide(x - mean, root, tau, PARAM)) + (0.5 * log_variance + LOG_2)
    elif LIKELIHOOD == BERNOULLI:
        return softplus(mean, APPROX) - x * mean
    elif LIKELIHOOD == LOGISTIC:
        # softplus(-p) + softplus(q) - log(1 - e^-w), each without what the first or last bin lacks:
        # their logarithms are taken as one, log((1 + e^-|p|)(1 + e^-|q|)/(1 - c)).
        p, q, first, last = _bin(x, mean, root, tau, x_mul, x_add, PARAM)
        near, _, c = _width(divide(x_mul, root, tau, PARAM), APPROX)
        c = tl.where(first | last, 0.0, c)
        above = tl.where(last, 0.0, exp(-tl.abs(p), APPROX))
        below = tl.where(first, 0.0, exp(-tl.abs(q), APPROX))
        value = tl.where(last | (p > 0.0), 0.0, -p) + tl.where(first | (q < 0.0), 0.0, q)
        value += log1p((above + below + above * below + c) / (1.0 - c))
        log_w = tl.where(near, tl.log(x_mul) - 0.5 * log_variance, 0.0)
        return value - tl.where(first | last, 0.0, log_w)
    elif LIKELIHOOD == STUDENT_T:
        y, far = _square_ratio(divide(x - mean, root, tau, PARAM), df)
        # log(1 + r²/ν), which is log(r²/ν) where r² is beyond all bounds; of either, one logarithm.
        u = 1.0 + y
        log_u = tl.log(tl.where(far, tl.abs(x - mean), u))
        near_one = u == 1.0
        log_term = tl.where(near_one, y, log_u * (y / tl.where(near_one, 1.0, u - 1.0)))
        log_term = tl.where(far, 2.0 * log_u - log_variance - tl.log(df), log_term)
        return 0.5 * ((df + 1.0) * log_term + log_variance) + constant
    else:
        return 0.5 * (x - mean) * (x - mean)


@triton.jit
def element_gradients(w, x, mean, root, tau, df, x_mul, x_add, LIKELIHOOD: tl.constexpr,
                      PARAM: tl.constexpr, APPROX: tl.constexpr):  # fmt: skip
    """∂x, -∂mean (the same, but for Bernoulli) and ∂(log τ) of ``w`` times ``element_nll``."""
    if LIKELIHOOD == GAUSSIAN:
        residual = divide(x - mean, root, tau, PARAM)
        g_x = divide(w * residual, root, tau, PARAM)
        return g_x, g_x, w * (1.0 - residual * residual)
    elif LIKELIHOOD == LAPLACE:
        d = x - mean
        sign = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))
        g_x = divide(w * sign, root, tau, PARAM)
        return g_x, g_x, w * (1.0 - tl.abs(divide(d, root, tau, PARAM)))
    elif LIKELIHOOD == BERNOULLI:
        return -w * mean, w * (x - sigmoid(mean, APPROX)), w
    elif LIKELIHOOD == LOGISTIC:
        p, q, first, last = _bin(x, mean, root, tau, x_mul, x_add, PARAM)
        beyond_p = tl.where(last, 0.0, sigmoid(-p, APPROX))
        below_q = tl.where(first, 0.0, sigmoid(q, APPROX))
        g_x = divide(w * (below_q - beyond_p), root, tau, PARAM)
        # Where a sigmoid is zero, so is its product with a bound, which may be infinite.
        g = tl.where(beyond_p == 0.0, beyond_p, p * beyond_p)
        g -= tl.where(below_q == 0.0, below_q, q * below_q)
        near, w_tau, c = _width(divide(x_mul, root, tau, PARAM), APPROX)
        width = tl.where(near, 1.0, w_tau) * exp(-w_tau, APPROX) / (1.0 - c)
        return g_x, g_x, w * (g + tl.where(first | last, 0.0, width))
    elif LIKELIHOOD == STUDENT_T:
        d = x - mean
        r = divide(d, root, tau, PARAM)
        y, far = _square_ratio(r, df)
        r = tl.where(far, 0.0, r)
        near_g_x = divide(w * ((df + 1.0) / df) * (r / (1.0 + y)), root, tau, PARAM)
        g_x = tl.where(far, w * ((df + 1.0) / tl.where(far, d, 1.0)), near_g_x)
        share = tl.where(far, 1.0, y / (1.0 + y))
        return g_x, g_x, w * (1.0 - (df + 1.0) * share)
    else:
        g_x = w * (x - mean)
        return g_x, g_x, w


@triton.jit
def _bin(x, mean, root, tau, x_mul, x_add, PARAM: tl.constexpr):
    """The bounds (x - m ± ½x_mul)/τ of x's bin, and whether it is the first or the last of 256.

    Each is divided by itself: where τ is tiny they are far apart, and one of them may be finite.
    """
    p = divide(x - mean + 0.5 * x_mul, root, tau, PARAM)
    q = divide(x - mean - 0.5 * x_mul, root, tau, PARAM)
    return p, q, x < x_add + 0.5 * x_mul, x > x_add + 254.5 * x_mul


@triton.jit
def _width(w, APPROX: tl.constexpr):
    """Whether w < ½, w itself but for a huge one, and c of 1 - e^-w = 1 - c, or w·(1 - c) if w < ½.

    The logarithm of w is exact however small w is, and that of 1 - c is near zero.
    """
    near = w < 0.5
    w = tl.where(w > 1e4, 1e4, w)
    return near, w, tl.where(near, w * exp_rest(-w), exp(-w, APPROX))


@triton.jit
def _square_ratio(r, df):
    """r²/ν, and where r is so far out that it is left at zero."""
    far = tl.abs(r) > 1e15
    r = tl.where(far, 0.0, r) * (1.0 / tl.sqrt(df))
    return r * r, far
