"""The scale parameter: σ, log σ and their derivatives for each parametrisation, as in reference.py.

``PARAM`` is the index in ("logvar", "logstd", "std", "var", "softplus").
"""

import math

import triton
import triton.language as tl

from .elementary import exp, exp_half, exp_minus_quarter, log1p_unit, reciprocal, tanh, tanh_slope

LOGVAR = tl.constexpr(0)
LOGSTD = tl.constexpr(1)
STD = tl.constexpr(2)
VAR = tl.constexpr(3)
SOFTPLUS = tl.constexpr(4)

# Codes of ``CLAMP``.
UNCLAMPED = tl.constexpr(0)
HARD = tl.constexpr(1)
SOFT = tl.constexpr(2)


def clamp_code(lo: float, hi: float, soft: bool) -> int:
    """How a launcher's bounds of the raw parameter are kept."""
    if lo == -math.inf and hi == math.inf:
        return UNCLAMPED.value
    return SOFT.value if soft else HARD.value


@triton.jit
def _softplus(s, APPROX: tl.constexpr):
    """softplus(s), its log and e^-|s|."""
    y = exp(-tl.abs(s), APPROX)
    sigma = tl.maximum(s, 0.0) + log1p_unit(y, APPROX)
    # softplus(s) -> e^s as s -> -inf; below -15 the second term of log(log(1 + y)) suffices.
    tail = s < -15.0
    log_sigma = tl.where(tail, s - 0.5 * y, tl.log(tl.where(tail, 1.0, sigma)))
    return log_sigma, sigma, y


@triton.jit
def _softplus_slopes(s, sigma, y, APPROX: tl.constexpr):
    """dσ/ds = sigmoid(s) and d(log σ)/ds = sigmoid(s)/σ."""
    sigmoid = tl.where(s < 0.0, y, 1.0) * reciprocal(1.0 + y, APPROX)
    tail = s < -15.0
    slope = sigmoid * reciprocal(tl.where(tail, 1.0, sigma), APPROX)
    return sigmoid, tl.where(tail, 1.0 - 0.5 * y, slope)


@triton.jit
def clamp(s, lo, hi):
    """``torch.clamp``: a NaN stays a NaN."""
    return tl.where(s < lo, lo, tl.where(s > hi, hi, s))


@triton.jit
def bound(raw, lo, hi, CLAMP: tl.constexpr, APPROX: tl.constexpr):
    """The parameter that σ is made from: the raw one, kept within (lo, hi)."""
    if CLAMP == HARD:
        return clamp(raw, lo, hi)
    elif CLAMP == SOFT:
        middle, reach = 0.5 * (lo + hi), 0.5 * (hi - lo)
        return middle + reach * tanh((raw - middle) * (1.0 / reach), APPROX)
    else:
        return raw


@triton.jit
def through_bound(g, raw, lo, hi, CLAMP: tl.constexpr, APPROX: tl.constexpr):
    """The gradient of ``raw`` from that of ``bound``."""
    if CLAMP == HARD:
        return tl.where((raw < lo) | (raw > hi), 0.0, g)
    elif CLAMP == SOFT:
        middle, reach = 0.5 * (lo + hi), 0.5 * (hi - lo)
        return g * tanh_slope((raw - middle) * (1.0 / reach), APPROX)
    else:
        return g


@triton.jit
def times_slope(g, slope):
    """g·slope, and 0 where g is 0: the slope of a scale that is masked may be anything."""
    return tl.where(g == 0.0, 0.0, g * slope)


@triton.jit
def _root(s):
    """√s. NVIDIA's fast one takes a subnormal variance for 0, whose root is an ordinary number."""
    if s.dtype == tl.float64:
        root = tl.sqrt(s)
    else:
        tiny = s < 2.0**-100
        root = tl.sqrt(tl.where(tiny, s * 2.0**64, s))
        root = tl.where(tiny, root * 2.0**-32, root)
    return root


@triton.jit
def log_variance_and_scale(s, PARAM: tl.constexpr, APPROX: tl.constexpr):
    """Log σ² = 2 log σ, and σ."""
    if PARAM == LOGVAR:
        log_variance, sigma = s, exp_half(s, APPROX)
    elif PARAM == LOGSTD:
        log_variance, sigma = 2.0 * s, exp(s, APPROX)
    elif PARAM == STD:
        log_variance, sigma = 2.0 * tl.log(s), s
    elif PARAM == VAR:
        log_variance, sigma = tl.log(s), _root(s)
    else:
        log_sigma, sigma, _ = _softplus(s, APPROX)
        log_variance = 2.0 * log_sigma
    return log_variance, sigma


@triton.jit
def scale_slopes(s, sigma, PARAM: tl.constexpr, APPROX: tl.constexpr):
    """dσ/ds and d(log σ)/ds."""
    if PARAM == LOGVAR:
        return 0.5 * sigma, tl.full(s.shape, 0.5, s.dtype)
    elif PARAM == LOGSTD:
        return sigma, tl.full(s.shape, 1.0, s.dtype)
    elif PARAM == STD:
        return tl.full(s.shape, 1.0, s.dtype), 1.0 / s
    elif PARAM == VAR:
        return 0.5 / sigma, 0.5 / s
    else:
        return _softplus_slopes(s, sigma, exp(-tl.abs(s), APPROX), APPROX)


@triton.jit
def log_variance_and_root(s, PARAM: tl.constexpr, APPROX: tl.constexpr):
    """Log τ² = 2 log τ, and τ^(-1/2), which ``divide`` takes.

    1/τ itself overflows long before x/τ does; its square root, multiplied in twice, does not. It is
    kept finite, so that times zero it is zero, and a NaN stays one.
    """
    if (PARAM == LOGVAR) | (PARAM == LOGSTD):
        log_variance = s if PARAM == LOGVAR else 2.0 * s
        root = exponential_root(log_variance, APPROX)
    else:
        log_variance, tau = log_variance_and_scale(s, PARAM, APPROX)
        least = 2.0**-1022 if s.dtype == tl.float64 else 2.0**-126
        root = tl.rsqrt(tl.maximum(tau, least, tl.PropagateNan.ALL))
        if PARAM == SOFTPLUS:
            root = tl.where(s < -15.0, exponential_root(log_variance, APPROX), root)
    return log_variance, root


@triton.jit
def exponential_root(log_variance, APPROX: tl.constexpr):
    """τ^(-1/2) from log τ²."""
    if log_variance.dtype == tl.float64:
        x = clamp(log_variance, -2800.0, 2800.0)
    else:
        x = tl.clamp(log_variance, -348.0, 348.0, tl.PropagateNan.ALL)
    return exp_minus_quarter(x, APPROX)


@triton.jit
def divide(v, root):
    """v/τ."""
    return v * root * root


@triton.jit
def log_scale_slope(s, PARAM: tl.constexpr, APPROX: tl.constexpr):
    """d(log τ)/ds."""
    if PARAM == SOFTPLUS:
        _, tau, y = _softplus(s, APPROX)
        _, slope = _softplus_slopes(s, tau, y, APPROX)
    else:
        _, slope = scale_slopes(s, s, PARAM, APPROX)
    return slope
