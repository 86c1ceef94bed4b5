"""The fused functions in plain PyTorch: the one truth that kernels are tested and timed against.

Every formula here is written as it stands in the literature, one tensor operation at a time, in the
dtype of its inputs' accumulation (fp32, or fp64 for fp64 inputs), and differentiated by autograd.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vae_fast import noise

__all__ = ["elbo_loss", "gaussian_nll", "reparameterize"]

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


def _accumulation(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


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
        sigma = F.softplus(s, threshold=100.0)
        # softplus(s) → e^s as s → −∞, so log σ → s: below −15 they agree to fp32 rounding, and
        # to fp64 rounding once the next term of log(1+y)/y is kept.
        tail = s < -15.0
        log_sigma = torch.where(
            tail, s - 0.5 * torch.exp(s.clamp(max=-15.0)), torch.log(F.softplus(s.clamp(min=-15.0)))
        )
        return log_sigma, sigma
    raise ValueError(f"param must be one of logvar, logstd, std, var, softplus; got {param!r}")


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
    eps: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference for :func:`vae_fast.reparameterize`, which documents the arguments.

    Args:
        eps: use this noise instead of the key's, shape of the returned z.
    """
    acc = _accumulation(mu)
    if eps is None:
        if key is None:
            key = noise.make_key(mu.device, generator)
        eps = noise.normal(key, mu.shape[0], num_samples, mu.shape[1:], first_row, acc)
    eps = eps.to(acc)
    s = scale.to(acc)
    if clamp is not None:
        s = torch.clamp(s, *clamp)
    log_sigma, sigma = log_scale_and_scale(s, param)
    z = mu.to(acc) + sigma * eps
    event = tuple(range(z.dim() - mu.dim() + 1, z.dim()))
    log_q = -_event_sum(0.5 * eps.square() + log_sigma + HALF_LOG_2PI, event)
    log_p = -_event_sum(0.5 * z.square() + HALF_LOG_2PI, event)
    return z.to(mu.dtype), log_q, log_p


def gaussian_nll(
    x: Tensor,
    mean: Tensor,
    scale: Tensor | None,
    param: str = "logvar",
    clamp: tuple[float, float] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Reference for :func:`vae_fast.gaussian_nll`, which documents the arguments."""
    acc = _accumulation(mean)
    if scale is None:
        mean, scale = mean.chunk(2, dim=mean.dim() - x.dim() + 1)
    x, mean, s = x.to(acc), mean.to(acc), scale.to(acc)
    if mask is not None:
        # Select before any arithmetic as well as after: autograd of where() multiplies an
        # unselected NaN by zero.
        x, mean = torch.where(mask, x, 0.0), torch.where(mask, mean, 0.0)
        s = torch.where(mask, s, 1.0)
    if clamp is not None:
        s = torch.clamp(s, *clamp)
    log_tau, _ = log_scale_and_scale(s, param)
    value = 0.5 * standardize(x - mean, s, param).square() + log_tau + HALF_LOG_2PI
    if mask is not None:
        value = torch.where(mask, value, 0.0)
    return _event_sum(value, tuple(range(mean.dim() - x.dim() + 1, mean.dim())))


def elbo_loss(
    nll: Tensor,
    log_q: Tensor,
    log_p: Tensor,
    beta: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Negative ELBO from per-row terms of shape (B,) or (K, B) (Kingma and Welling 2014, eq. 3;
    β as in Higgins et al. 2017, eq. 4): the mean over k, then ``reduction`` over the batch.
    """
    rows = nll + beta * (log_q - log_p)
    if rows.dim() == 2:
        rows = rows.mean(0)
    if reduction == "mean":
        return rows.mean()
    if reduction == "sum":
        return rows.sum()
    return rows


def _event_sum(value: Tensor, dims: tuple[int, ...]) -> Tensor:
    # sum(dim=()) would sum every dimension.
    return value.sum(dims) if dims else value
