"""The loss given a decoder's output, as different people write it.

A latent function takes (mu, logvar) and returns (z, log_q, log_p); it draws its own noise, which is
part of its time. A likelihood function takes (x, mean, logvar) and returns −log p(x|z) of each row.
A loss takes (x, mu, logvar, mean, logvar_x), the last two from the decoder, and returns the batch's
mean of −log p(x|z) + log q(z|x) − log p(z). torch.compile gets each function as one graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from saved import COMPILE, INPLACE, OURS
from torch.distributions import Bernoulli, Laplace, Normal, StudentT, kl_divergence
from torch.nn import functional as F

import vae_fast

LOG_2PI = math.log(2 * math.pi)


def eager_latent(mu, logvar):
    """Plain PyTorch, written with care: no term is computed twice, and constants once a row."""
    eps = torch.randn_like(mu)
    z = mu + torch.exp(0.5 * logvar) * eps
    constant = 0.5 * LOG_2PI * mu.shape[1]
    log_q = -0.5 * (eps.square() + logvar).sum(1) - constant
    log_p = -0.5 * z.square().sum(1) - constant
    return z, log_q, log_p


def eager_likelihood(x, mean, logvar):
    x = scaled(x, mean)
    squares = (x - mean).square() * torch.exp(-logvar)
    return 0.5 * (squares + logvar).sum(1) + 0.5 * LOG_2PI * x.shape[1]


def distributions_latent(mu, logvar):
    """torch.distributions, argument validation off."""
    q = Normal(mu, torch.exp(0.5 * logvar), validate_args=False)
    z = q.rsample()
    p = Normal(torch.zeros_like(mu), torch.ones_like(mu), validate_args=False)
    return z, q.log_prob(z).sum(1), p.log_prob(z).sum(1)


def distributions_likelihood(x, mean, logvar):
    return -normal(mean, logvar).log_prob(scaled(x, mean)).sum(1)


def nll_loss_likelihood(x, mean, logvar):
    """PyTorch's own loss, which takes a variance."""
    x = scaled(x, mean)
    return F.gaussian_nll_loss(mean, x, torch.exp(logvar), full=True, reduction="none").sum(1)


def eager_kl(mu, logvar):
    rows, elements = mu.shape
    return 0.5 / rows * (mu.square() + logvar.exp() - logvar).sum() - 0.5 * elements


def distributions_kl(mu, logvar):
    q = Normal(mu, torch.exp(0.5 * logvar), validate_args=False)
    p = Normal(torch.zeros_like(mu), torch.ones_like(mu), validate_args=False)
    return kl_divergence(q, p).sum(1).mean()


FREE_BITS = 0.8  # about half of the elements of cases.KL have more


def eager_free_bits(mu, logvar):
    elements = 0.5 * (mu.square() + logvar.exp() - logvar).mean(0) - 0.5
    return elements.clamp(min=FREE_BITS).sum()


def fused_free_bits(mu, logvar):
    """What FusedELBO does: the rows of the transposed tensors are the latent's elements."""
    summed = vae_fast.gaussian_kl(mu.t(), logvar.t())
    return (summed / len(mu)).clamp(min=FREE_BITS).sum()


def scaled(x, mean):
    """Data as the decoder's means are: 8-bit levels become values from 0 to 1."""
    return x.to(mean.dtype) / 255 if x.dtype == torch.uint8 else x


def mean_of(likelihood):
    return lambda x, mean, logvar: likelihood(x, mean, logvar).mean()


def whole(latent, likelihood):
    def loss(x, mu, logvar, mean, logvar_x):
        _, log_q, log_p = latent(mu, logvar)
        return (likelihood(x, mean, logvar_x) + log_q - log_p).mean()

    return loss


def fused(inplace):
    elbo = vae_fast.FusedELBO(inplace=inplace)
    return lambda x, mu, logvar, *decoded: elbo(x, mu, logvar, lambda z: decoded).loss


def fused_likelihood(inplace, **options):
    """The likelihood pass of FusedELBO: no KL term."""

    def loss(x, mean, logvar):
        kl = torch.zeros(len(x), device=x.device)
        scale = None if options.get("likelihood") == "bernoulli" else logvar
        return vae_fast.fused_elbo(x, mean, scale, kl, inplace=inplace, **options)[0]

    return loss


CLAMP = (-1.0, 1.0)


def eager_clamped(x, mean, logvar):
    return eager_likelihood(x, mean, logvar.clamp(*CLAMP))


def eager_laplace(x, mean, logvar):
    log_b = 0.5 * logvar
    return ((x - mean).abs() * torch.exp(-log_b) + log_b).sum(1) + math.log(2) * x.shape[1]


def eager_student_t(x, mean, logvar):
    df = 4.0
    constant = math.lgamma(df / 2) - math.lgamma((df + 1) / 2) + 0.5 * math.log(math.pi * df)
    square = (x - mean).square() * torch.exp(-logvar)
    elements = 0.5 * (df + 1) * torch.log1p(square / df) + 0.5 * logvar
    return elements.sum(1) + constant * x.shape[1]


def eager_bernoulli(x, mean, logvar):
    return F.binary_cross_entropy_with_logits(mean, x, reduction="none").sum(1)


def eager_logistic(x, mean, logvar):
    """The masses of 256 levels, as PixelCNN++ has them."""
    r, half = scaled(x, mean) - mean, 0.5 / 255
    inverse = torch.exp(-0.5 * logvar)
    above, below = (r + half) * inverse, (r - half) * inverse
    inner = torch.log((torch.sigmoid(above) - torch.sigmoid(below)).clamp(min=1e-12))
    edge = torch.where(x == 0, F.logsigmoid(above), F.logsigmoid(-below))
    return -torch.where((x == 0) | (x == 255), edge, inner).sum(1)


def by_distribution(make):
    """The likelihood of a torch.distributions object."""
    return lambda x, mean, logvar: -make(mean, logvar).log_prob(x).sum(1)


def normal(mean, logvar):
    return Normal(mean, torch.exp(0.5 * logvar), validate_args=False)


def normal_clamped(mean, logvar):
    return normal(mean, logvar.clamp(*CLAMP))


def laplace(mean, logvar):
    return Laplace(mean, torch.exp(0.5 * logvar), validate_args=False)


def student_t(mean, logvar):
    return StudentT(4.0, mean, torch.exp(0.5 * logvar), validate_args=False)


def bernoulli(mean, logvar):
    return Bernoulli(logits=mean, validate_args=False)


#: Ways to compile a function as a whole, for one shape. On a CPU torch.compile makes normal numbers
#: in code of its own, which takes several times as long as PyTorch's: told so, it calls the latter.
RANDN = f"{COMPILE} PyTorch's randn"
MODES: dict[str, dict] = {
    COMPILE: {},
    RANDN: {"options": {"fallback_random": True}},
    f"{COMPILE} max-autotune": {"mode": "max-autotune"},
}
if torch.cuda.is_available():
    MODES[f"{COMPILE} CUDA graphs"] = {"mode": "reduce-overhead"}


def compiled(function) -> dict[str, Callable]:
    return {
        name: partial(torch.compile, function, fullgraph=True, dynamic=False, **mode)
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
        INPLACE: lambda: fused_likelihood(inplace=True),
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
    "kl": {
        **made(eager=eager_kl, distributions=distributions_kl),
        **compiled(eager_kl),
        OURS: lambda: lambda mu, logvar: vae_fast.gaussian_kl(mu, logvar).mean(),
    },
    "free bits": {
        **made(eager=eager_free_bits),
        **compiled(eager_free_bits),
        OURS: lambda: fused_free_bits,
    },
}
KL = ("kl", "free bits")

#: Options of the likelihood, or a scale of another shape: those of ours, then how others write it.
OPTIONS: dict[str, tuple[dict, Callable, Callable | None]] = {
    "clamped": ({"clamp": CLAMP}, eager_clamped, normal_clamped),
    "per_pixel": ({}, eager_likelihood, normal),  # one scale for all rows
    "laplace": ({"likelihood": "laplace"}, eager_laplace, laplace),
    "student_t": ({"likelihood": "student_t"}, eager_student_t, student_t),
    "bernoulli": ({"likelihood": "bernoulli"}, eager_bernoulli, bernoulli),
    "logistic": ({"likelihood": "logistic"}, eager_logistic, None),
}
for name, (options, eager, distribution) in OPTIONS.items():
    others = {} if distribution is None else {"distributions": by_distribution(distribution)}
    IMPLEMENTATIONS[name] = {
        **made(eager=mean_of(eager), **{n: mean_of(f) for n, f in others.items()}),
        **compiled(mean_of(eager)),
        OURS: partial(fused_likelihood, inplace=False, **options),
        INPLACE: partial(fused_likelihood, inplace=True, **options),
    }
del IMPLEMENTATIONS["per_pixel"][INPLACE]  # where it has no effect
