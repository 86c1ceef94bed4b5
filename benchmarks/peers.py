"""The loss given a decoder's output, as different people write it.

A latent function takes (mu, logvar) and returns (z, log_q, log_p); it draws its own noise, which is
part of its time. A likelihood function takes (x, mean, logvar) and returns −log p(x|z) of each row.
A loss takes (x, mu, logvar, decode), where ``decode`` turns z into (mean, logvar), and returns the
batch mean of −log p(x|z) + log q(z|x) − log p(z).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from saved import INPLACE, OURS
from torch.distributions import Normal
from torch.nn import functional as F

import vae_fast

LOG_2PI = math.log(2 * math.pi)


def eager_latent(mu, logvar):
    """Plain PyTorch, written with care: no term is computed twice."""
    eps = torch.randn_like(mu)
    z = mu + torch.exp(0.5 * logvar) * eps
    log_q = -0.5 * (eps.square() + logvar + LOG_2PI).sum(1)
    log_p = -0.5 * (z.square() + LOG_2PI).sum(1)
    return z, log_q, log_p


def eager_likelihood(x, mean, logvar):
    x = scaled(x, mean)
    return 0.5 * ((x - mean).square() * torch.exp(-logvar) + logvar + LOG_2PI).sum(1)


def distributions_latent(mu, logvar):
    """torch.distributions, argument validation off."""
    q = Normal(mu, torch.exp(0.5 * logvar), validate_args=False)
    z = q.rsample()
    p = Normal(torch.zeros_like(mu), torch.ones_like(mu), validate_args=False)
    return z, q.log_prob(z).sum(1), p.log_prob(z).sum(1)


def distributions_likelihood(x, mean, logvar):
    p = Normal(mean, torch.exp(0.5 * logvar), validate_args=False)
    return -p.log_prob(scaled(x, mean)).sum(1)


def nll_loss_likelihood(x, mean, logvar):
    """PyTorch's own loss, which takes a variance."""
    x = scaled(x, mean)
    return F.gaussian_nll_loss(mean, x, torch.exp(logvar), full=True, reduction="none").sum(1)


def scaled(x, mean):
    """Data as the decoder's means are: 8-bit levels become values from 0 to 1."""
    return x.to(mean.dtype) / 255 if x.dtype == torch.uint8 else x


def mean_of(likelihood):
    return lambda x, mean, logvar: likelihood(x, mean, logvar).mean()


def whole(latent, likelihood):
    def loss(x, mu, logvar, decode):
        z, log_q, log_p = latent(mu, logvar)
        return (likelihood(x, *decode(z)) + log_q - log_p).mean()

    return loss


def fused(inplace):
    elbo = vae_fast.FusedELBO(inplace=inplace)
    return lambda x, mu, logvar, decode: elbo(x, mu, logvar, decode).loss


def fused_likelihood_inplace(x, mean, logvar):
    """The likelihood pass of FusedELBO(inplace=True): no KL term."""
    kl = torch.zeros(len(x), device=x.device)
    return vae_fast.fused_elbo(x, mean, logvar, kl, inplace=True)[0]


MODES = {"torch.compile": None, "torch.compile max-autotune": "max-autotune"}
if torch.cuda.is_available():
    MODES["torch.compile CUDA graphs"] = "reduce-overhead"


def compiled(function) -> dict[str, Callable]:
    """The function compiled for one shape, in each mode."""
    return {
        name: lambda mode=mode: torch.compile(function, dynamic=False, mode=mode)
        for name, mode in MODES.items()
    }


def made(**functions) -> dict[str, Callable]:
    return {name.replace("_", " "): lambda f=f: f for name, f in functions.items()}


#: Who takes part in each group: functions that make an implementation.
IMPLEMENTATIONS: dict[str, dict[str, Callable[[], Callable]]] = {
    "latent": {
        **made(eager=eager_latent, distributions=distributions_latent),
        **compiled(eager_latent),
        OURS: lambda: vae_fast.reparameterize,
    },
    "likelihood": {
        **made(
            eager=mean_of(eager_likelihood),
            distributions=mean_of(distributions_likelihood),
            gaussian_nll_loss=mean_of(nll_loss_likelihood),
        ),
        **compiled(mean_of(eager_likelihood)),
        OURS: lambda: mean_of(vae_fast.gaussian_nll),
        INPLACE: lambda: fused_likelihood_inplace,
    },
    "elbo": {
        **made(
            eager=whole(eager_latent, eager_likelihood),
            distributions=whole(distributions_latent, distributions_likelihood),
            gaussian_nll_loss=whole(eager_latent, nll_loss_likelihood),
        ),
        **compiled(whole(eager_latent, eager_likelihood)),
        OURS: lambda: fused(inplace=False),
        INPLACE: lambda: fused(inplace=True),
    },
}
