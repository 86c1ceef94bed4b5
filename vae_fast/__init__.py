"""Fused kernels for training variational autoencoders in PyTorch."""

__version__ = "0.1.0"

from vae_fast import backends, functional, noise, reference, schedules
from vae_fast.backends import FallbackWarning, use_backend
from vae_fast.elbo import ELBOOutput, FusedELBO
from vae_fast.functional import (
    fused_elbo,
    gaussian_kl,
    gaussian_nll,
    importance_bound,
    likelihood_nll,
    optimal_gaussian_nll,
    reparameterize,
    validate,
)
from vae_fast.vae import VAE

__all__ = [
    "VAE",
    "ELBOOutput",
    "FallbackWarning",
    "FusedELBO",
    "backends",
    "functional",
    "fused_elbo",
    "gaussian_kl",
    "gaussian_nll",
    "importance_bound",
    "likelihood_nll",
    "noise",
    "optimal_gaussian_nll",
    "reference",
    "reparameterize",
    "schedules",
    "use_backend",
    "validate",
]
