"""The fused functions in plain PyTorch: the one truth that kernels are tested and timed against.

Every formula here is written as it stands in the literature, one tensor operation at a time, in the
dtype of its inputs' accumulation (fp32, or fp64 for fp64 inputs), and differentiated by autograd.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vae_fast import noise, ops

__all__ = [
    "elbo_loss",
    "gaussian_kl",
    "gaussian_nll",
    "importance_bound",
    "likelihood_nll",
    "reparameterize",
]

X_SCALE = (1.0 / 255.0, 0.0)  # what a uint8 x means by default: [0, 1]
HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_LINEAR = 80.0  # softplus(s) is s from here on, to fp64 rounding, and e^s is still an fp32 number


def log_scale_and_scale(s: Tensor, param: str) -> tuple[Tensor, Tensor]:
    """Log σ and σ of a raw scale parameter ``s``."""
    if param == "logvar":
        return 0.5 * s, torch.exp(0.5 * s)
    if param == "logstd":
        return s, torch.exp(s)
    if param == "std":
        return torch.log(s), s
    if param == "var":
        return 0.5 * torch.log(s), torch.sqrt(s)
    if param == "softplus":
        sigma = F.softplus(s, threshold=_LINEAR)
        # softplus(s) → e^s as s → −∞, so log σ → s: below −15 they agree to fp32 rounding, and
        # to fp64 rounding once the next term of log(1+y)/y is kept.
        tail = s < -15.0
        log_sigma = torch.where(
            tail,
            s - 0.5 * torch.exp(s.clamp(max=-15.0)),
            torch.log(F.softplus(s.clamp(min=-15.0), threshold=_LINEAR)),
        )
        return log_sigma, sigma
    raise ValueError(f"param must be one of logvar, logstd, std, var, softplus; got {param!r}")


def clamp_scale(s: Tensor, clamp: tuple[float, float] | None, mode: str = "hard") -> Tensor:
    """A raw scale parameter kept within (lo, hi): as ``torch.clamp`` does, or smoothly."""
    if clamp is None:
        return s
    lo, hi = clamp
    if mode == "hard":
        return torch.clamp(s, lo, hi)
    middle, reach = 0.5 * (lo + hi), 0.5 * (hi - lo)
    return middle + reach * torch.tanh((s - middle) / reach)


def standardize(residual: Tensor, s: Tensor, param: str) -> Tensor:
    """``residual``/σ, finite wherever the exact quotient is, and 0 for a zero residual."""
    if param in ("std", "var"):
        return residual / log_scale_and_scale(s, param)[1]
    # 1/σ may overflow where the quotient does not, so it is multiplied in as two square roots. The
    # limit is beyond every scale at which a non-zero residual has a finite likelihood.
    limit = 600.0 if s.dtype == torch.float64 else 80.0
    root = torch.exp(torch.clamp(-0.5 * log_scale_and_scale(s, param)[0], max=limit))
    return residual * root * root


def reparameterize(
    mu: Tensor,
    scale: Tensor,
    param: str = "logvar",
    num_samples: int | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    first_row: int = 0,
    clamp: tuple[float, float] | None = None,
    clamp_mode: str = "hard",
    path_gradient: bool = False,
    eps: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference for :func:`vae_fast.reparameterize`, which documents the arguments.

    Args:
        eps: use this noise instead of the key's, shape of the returned z.
    """
    acc = ops.accumulation_dtype(mu)
    if eps is None:
        if key is None:
            key = noise.make_key(mu.device, generator)
        eps = noise.normal(key, mu.shape[0], num_samples, mu.shape[1:], first_row, acc)
    eps = eps.to(acc)
    log_sigma, sigma = log_scale_and_scale(clamp_scale(scale.to(acc), clamp, clamp_mode), param)
    z = mu.to(acc) + sigma * eps
    event = tuple(range(z.dim() - mu.dim() + 1, z.dim()))
    half_square = 0.5 * eps.square()
    if path_gradient:
        # ε as a function of z, with the posterior's parameters held; the value is ε's own, since
        # (z − μ)/σ cancels.
        through_z = (z - mu.to(acc).detach()) / sigma.detach()
        half_square = half_square + 0.5 * (through_z.square() - through_z.detach().square())
        log_sigma = log_sigma.detach()
    log_q = -_event_sum(half_square + log_sigma + HALF_LOG_2PI, event)
    log_p = -_event_sum(0.5 * z.square() + HALF_LOG_2PI, event)
    return z.to(mu.dtype), log_q, log_p


def gaussian_nll(
    x: Tensor,
    mean: Tensor,
    scale: Tensor | float | None,
    param: str = "logvar",
    clamp: tuple[float, float] | None = None,
    mask: Tensor | None = None,
    **options: object,
) -> Tensor:
    """Reference for :func:`vae_fast.gaussian_nll`, which documents the arguments."""
    return likelihood_nll(x, mean, scale, "gaussian", param, clamp, mask=mask, **options)


def likelihood_nll(
    x: Tensor,
    mean: Tensor,
    scale: Tensor | float | None = None,
    likelihood: str = "gaussian",
    param: str = "logvar",
    clamp: tuple[float, float] | None = None,
    clamp_mode: str = "hard",
    mask: Tensor | None = None,
    df: float = 4.0,
    x_scale: tuple[float, float] | None = None,
    dequantize: bool = False,
    key: Tensor | None = None,
    first_row: int = 0,
) -> Tensor:
    """Reference for :func:`vae_fast.likelihood_nll`, which documents the arguments."""
    acc = ops.accumulation_dtype(mean)
    mul, add = X_SCALE if x_scale is None else x_scale
    event = tuple(range(mean.dim() - x.dim() + 1, mean.dim()))
    with_scale = likelihood not in ("bernoulli", "squared_error")
    if with_scale and scale is None:
        mean, scale = mean.chunk(2, dim=mean.dim() - x.dim() + 1)
    mean = mean.to(acc)
    if x.dtype == torch.uint8:
        levels = x.to(acc)
        if dequantize:
            key = noise.make_key(x.device) if key is None else key
            levels = levels + noise.uniform(key, x.shape[0], x.shape[1:], first_row).to(acc)
        x = levels * mul + add
    x = x.to(acc)
    s = torch.as_tensor(scale, dtype=acc, device=mean.device) if with_scale else None
    if mask is not None:
        # Select before any arithmetic as well as after: autograd of where() multiplies an
        # unselected NaN by zero.
        x, mean = torch.where(mask, x, 0.0), torch.where(mask, mean, 0.0)
        s = torch.where(mask, s, 1.0) if with_scale else None
    if with_scale:
        s = clamp_scale(s, clamp, clamp_mode)
    value = _ELEMENTS[likelihood](x, mean, s, param, df, mul, add)
    if mask is not None:
        value = torch.where(mask, value, 0.0)
    return _event_sum(value, event)


# ---- −log p of one element: data x, location m, raw scale s ------------------------------------


def _gaussian(x, m, s, param, *_):
    log_tau, _ = log_scale_and_scale(s, param)
    r = standardize(x - m, s, param)
    return 0.5 * r * r + log_tau + HALF_LOG_2PI


def _laplace(x, m, s, param, *_):
    log_tau, _ = log_scale_and_scale(s, param)
    return standardize(x - m, s, param).abs() + log_tau + math.log(2.0)


def _bernoulli(x, m, *_):
    """Of logits m: −x·log σ(m) − (1 − x)·log σ(−m), of which the larger term is taken apart."""
    return torch.where(m < 0, -x * m - F.logsigmoid(-m), (1.0 - x) * m - F.logsigmoid(m))


def _logistic(x, m, s, param, df, mul, add):
    """The mass that a logistic density puts on x's bin, the first and last reaching to infinity.

    −log(σ(p) − σ(q)) for p, q = (x − m ± ½·mul)/τ, with σ(p) − σ(q) = σ(p)·σ(−q)·(1 − e^{−mul/τ}).
    """
    log_tau, _ = log_scale_and_scale(s, param)
    first, last = x < add + 0.5 * mul, x > add + 254.5 * mul
    value = -_log_sigmoid(x - m + 0.5 * mul, s, param, last)
    value = value - _log_sigmoid(m - x + 0.5 * mul, s, param, first)
    # log(1 − e^{−w}) for w = mul/τ, whose logarithm is exact however small w is; 0 for a large w.
    log_w = math.log(mul) - log_tau
    w = torch.exp(log_w.clamp(max=4.0))
    log_width = log_w + torch.log(
        torch.where(w < 1e-4, 1.0 - w * (0.5 - w / 6.0), -torch.expm1(-w) / w)
    )
    log_width = torch.where(log_w > 3.9, 0.0, log_width)
    return value - torch.where(first | last, 0.0, log_width)


def _log_sigmoid(d, s, param, nil):
    """Log σ(d/τ), or 0 where ``nil``; and where it is 0 to any rounding, for d/τ may overflow."""
    nil = nil | (standardize(d.detach(), s.detach(), param) > 1e4)
    return torch.where(nil, 0.0, F.logsigmoid(standardize(torch.where(nil, 0.0, d), s, param)))


def student_t_constant(df: float) -> float:
    """The terms of Student's −log p that do not depend on the element: log(B(ν/2, ½)·√ν).

    For many degrees of freedom log Γ(ν/2) and log Γ((ν + 1)/2) cancel, and their difference comes
    from Stirling's series: ½ log 2π + 1/(4ν) − 1/(24ν³) + 1/(20ν⁵).
    """
    if df > 100.0:
        return HALF_LOG_2PI + (0.25 - (1.0 / 24.0 - 0.05 / (df * df)) / (df * df)) / df
    return math.lgamma(0.5 * df) - math.lgamma(0.5 * (df + 1.0)) + 0.5 * math.log(math.pi * df)


def _student_t(x, m, s, param, df, *_):
    log_tau, _ = log_scale_and_scale(s, param)
    d, root = x - m, math.sqrt(df)
    # log(1 + r²/ν), which is log(r²/ν) where r² may overflow, and r itself
    far = standardize(d.detach(), s.detach(), param).abs() / root > 1e15
    log_term = torch.where(
        far,
        2.0 * (torch.log(torch.where(far, d, 1.0).abs()) - log_tau) - math.log(df),
        torch.log1p((standardize(torch.where(far, 0.0, d), s, param) / root).square()),
    )
    return 0.5 * (df + 1.0) * log_term + log_tau + student_t_constant(df)


def _squared_error(x, m, *_):
    return 0.5 * (x - m) * (x - m)


_ELEMENTS = {
    "gaussian": _gaussian,
    "laplace": _laplace,
    "bernoulli": _bernoulli,
    "logistic": _logistic,
    "student_t": _student_t,
    "squared_error": _squared_error,
}


def gaussian_kl(
    mu: Tensor,
    scale: Tensor,
    prior: tuple[Tensor, Tensor] | None = None,
    param: str = "logvar",
    prior_param: str = "logvar",
    clamp: tuple[float, float] | None = None,
    clamp_mode: str = "hard",
) -> Tensor:
    """Reference for :func:`vae_fast.gaussian_kl`, which documents the arguments."""
    acc = ops.accumulation_dtype(mu)
    log_q, _ = log_scale_and_scale(clamp_scale(scale.to(acc), clamp, clamp_mode), param)
    if prior is None:
        log_p, delta = 0.0, mu.to(acc)
    else:
        prior_scale = prior[1].to(acc)
        log_p, _ = log_scale_and_scale(prior_scale, prior_param)
        delta = standardize(mu.to(acc) - prior[0].to(acc), prior_scale, prior_param)
    # ½(ρ² − 1) − log ρ for ρ = σ_q/σ_p, from t = log ρ²
    value = 0.5 * (_exp_minus_1_minus(2.0 * (log_q - log_p)) + delta.square())
    return _event_sum(value.expand(mu.shape), tuple(range(1, mu.dim())))


def _exp_minus_1_minus(t: Tensor) -> Tensor:
    """e^t − 1 − t, which near zero cancels and comes from its series instead."""
    near = t.abs() < 0.5
    small = torch.where(near, t, 0.0)
    series = torch.zeros_like(small)
    for n in range(15, 2, -1):  # Horner: ½ + t/3! + t²/4! + ...
        series = (series + 1.0 / math.factorial(n)) * small
    series = (series + 0.5) * small.square()
    far = torch.where(near, 0.0, t)
    return torch.where(near, series, torch.expm1(far) - far)


def importance_bound(
    nll: Tensor, log_q: Tensor, log_p: Tensor | None = None, beta: float = 1.0
) -> Tensor:
    """The negative importance-weighted bound of each row, −log(1/K Σ_k w_k), from terms (K, B).

    log w = −nll − β(log q − log p) (Burda et al. 2016, "Importance Weighted Autoencoders", eq. 8).
    """
    log_p = 0.0 if log_p is None else log_p
    log_w = -(nll + beta * (log_q - log_p))
    return math.log(log_w.shape[0]) - torch.logsumexp(log_w, 0)


def elbo_loss(
    nll: Tensor,
    log_q: Tensor,
    log_p: Tensor | None = None,
    beta: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Negative ELBO from per-row terms of shape (B,) or (K, B) (Kingma and Welling 2014, eq. 3;
    β as in Higgins et al. 2017, eq. 4): the mean over k, then ``reduction`` over the batch.
    """
    rows = nll + beta * (log_q if log_p is None else log_q - log_p)
    return reduce_rows(rows.mean(0) if rows.dim() == 2 else rows, reduction)


def reduce_rows(rows: Tensor, reduction: str) -> Tensor:
    """The rows' mean or sum, or the rows."""
    if reduction == "mean":
        return rows.mean()
    if reduction == "sum":
        return rows.sum()
    return rows


def _event_sum(value: Tensor, dims: tuple[int, ...]) -> Tensor:
    # sum(dim=()) would sum every dimension.
    return value.sum(dims) if dims else value
