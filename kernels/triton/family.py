"""The likelihoods of one element: -log p(x) and its derivatives, as in reference.py.

``LIKELIHOOD`` is the index in ("gaussian", "laplace", "bernoulli", "logistic", "student_t",
"squared_error"). What the formulas of value and derivatives share is written in both: the compiler
makes it once.
"""

import math

import triton
import triton.language as tl

from .elementary import exp, exp_rest, log1p, log1p_unit, reciprocal, sigmoid
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
def element_nll(x, mean, log_variance, root, df, constant, x_mul, x_add,
                LIKELIHOOD: tl.constexpr, APPROX: tl.constexpr):  # fmt: skip
    """-log p(x).

    Args:
        log_variance, root: of ``log_variance_and_root``; not used where there is no scale.
        df, constant: of Student's t.
        x_mul, x_add: the levels that logistic bins are around.
    """
    if LIKELIHOOD == GAUSSIAN:
        residual = divide(x - mean, root)
        # Half of r, not of r², which may overflow.
        return 0.5 * residual * residual + (0.5 * log_variance + 0.5 * LOG_2PI)
    elif LIKELIHOOD == LAPLACE:
        return tl.abs(divide(x - mean, root)) + (0.5 * log_variance + LOG_2)
    elif LIKELIHOOD == BERNOULLI:
        # softplus(mean) - x·mean, without what cancels where x is certain, and right.
        log_term = log1p_unit(exp(-tl.abs(mean), APPROX), APPROX)
        return tl.where(mean < 0.0, -x, 1.0 - x) * mean + log_term
    elif LIKELIHOOD == LOGISTIC:
        # softplus(-p) + softplus(q) - log(1 - e^-w): their logarithms are taken as one,
        # log((1 + e^-|p|)(1 + e^-|q|)/(1 - c)).
        p, q, w = _bin(x, mean, root, x_mul, x_add)
        near, c = _width(w, APPROX)
        above, below = exp(-tl.abs(p), APPROX), exp(-tl.abs(q), APPROX)
        y = (above + below + above * below + c) * reciprocal(1.0 - c, APPROX)
        value = tl.maximum(-p, 0.0) + tl.maximum(q, 0.0) + log1p(y, APPROX)
        return value - tl.where(near, tl.log(x_mul) - 0.5 * log_variance, 0.0)
    elif LIKELIHOOD == STUDENT_T:
        t, far = _over_root_df(divide(x - mean, root), df)
        # log(1 + r²/ν), which is log(r²/ν) where r² is beyond all bounds; of either, one logarithm.
        # What u was rounded by is added to first order, as in log1p.
        u = 1.0 + t * t
        log_u = tl.log(tl.where(far, tl.abs(x - mean), u))
        rest = (t * t - (u - 1.0)) * reciprocal(u, APPROX)
        log_term = tl.where(far, 2.0 * log_u - log_variance - tl.log(df), log_u + rest)
        return 0.5 * ((df + 1.0) * log_term + log_variance) + constant
    else:
        return 0.5 * (x - mean) * (x - mean)


@triton.jit
def element_gradients(w, x, mean, root, df, x_mul, x_add, LIKELIHOOD: tl.constexpr,
                      APPROX: tl.constexpr):  # fmt: skip
    """∂x, -∂mean (the same, but for Bernoulli) and ∂(log τ) of ``w`` times ``element_nll``."""
    if LIKELIHOOD == GAUSSIAN:
        residual = divide(x - mean, root)
        g_x = divide(w * residual, root)
        return g_x, g_x, w * (1.0 - residual * residual)
    elif LIKELIHOOD == LAPLACE:
        d = x - mean
        sign = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))
        g_x = divide(w * sign, root)
        return g_x, g_x, w * (1.0 - tl.abs(divide(d, root)))
    elif LIKELIHOOD == BERNOULLI:
        return -w * mean, w * (x - sigmoid(mean, APPROX)), w
    elif LIKELIHOOD == LOGISTIC:
        p, q, w_tau = _bin(x, mean, root, x_mul, x_add)
        near, c = _width(w_tau, APPROX)
        above, below = exp(-tl.abs(p), APPROX), exp(-tl.abs(q), APPROX)
        over_above, over_below = reciprocal(1.0 + above, APPROX), reciprocal(1.0 + below, APPROX)
        # sigmoid(-p), sigmoid(q), and their difference without the roundings of either.
        beyond_p = tl.where(p < 0.0, 1.0, above) * over_above
        below_q = tl.where(q > 0.0, 1.0, below) * over_below
        change = 1.0 - above * below
        change = tl.where(q > 0.0, change, tl.where(p < 0.0, -change, below - above))
        g_x = divide(w * change * (over_above * over_below), root)
        # Where a sigmoid is zero, so is its product with a bound, which may be infinite.
        g = tl.where(beyond_p == 0.0, 0.0, p * beyond_p)
        g -= tl.where(below_q == 0.0, 0.0, q * below_q)
        over = reciprocal(1.0 - c, APPROX)  # w·e^-w/(1 - e^-w), by c alone
        width = tl.where(near, over - w_tau, w_tau * c * over)
        return g_x, g_x, w * (g + width)
    elif LIKELIHOOD == STUDENT_T:
        d = x - mean
        t, far = _over_root_df(divide(d, root), df)
        over_u = reciprocal(1.0 + t * t, APPROX)
        share = t * over_u
        more = w * (df + 1.0)
        near_g_x = divide(more * (share * (1.0 / tl.sqrt(df))), root)
        g_x = tl.where(far, more / tl.where(far, d, 1.0), near_g_x)
        # 1 - (ν + 1)t²/(1 + t²), whose t² may be far above 1 and ν far below.
        return g_x, g_x, w * (over_u - df * (t * share))
    else:
        g_x = w * (x - mean)
        return g_x, g_x, w


@triton.jit
def _bin(x, mean, root, x_mul, x_add):
    """The bounds (x - m ± ½x_mul)/τ of x's bin, and its width w = x_mul/τ.

    The first of 256 bins reaches to -inf and the last to inf. A w whose e^-w is 0 is left at 10^4,
    and for those two it is that. Each bound is divided by itself: where τ is tiny they are far
    apart, and one of them may be finite.
    """
    first, last = x < x_add + 0.5 * x_mul, x > x_add + 254.5 * x_mul
    p = tl.where(last, float("inf"), divide(x - mean + 0.5 * x_mul, root))
    q = tl.where(first, float("-inf"), divide(x - mean - 0.5 * x_mul, root))
    w = divide(x_mul, root)
    return p, q, tl.where(first | last, 1e4, tl.where(w > 1e4, 1e4, w))


@triton.jit
def _width(w, APPROX: tl.constexpr):
    """Whether w < ½, and c of 1 - e^-w = 1 - c, or w·(1 - c) if w < ½.

    The logarithm of w is exact however small w is, and that of 1 - c is near zero.
    """
    near = w < 0.5
    return near, tl.where(near, w * exp_rest(-w), exp(-w, APPROX))


@triton.jit
def _over_root_df(r, df):
    """What is r/√ν, and where that is so far out that it is left at 10^15."""
    t = r * (1.0 / tl.sqrt(df))
    far = tl.abs(t) > 1e15
    return tl.where(far, 1e15, t), far
