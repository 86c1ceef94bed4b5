"""Fused kernels for training variational autoencoders in PyTorch."""

__version__ = "0.1.0"

from vae_fast import backends, functional, noise, reference
from vae_fast.backends import FallbackWarning, use_backend
from vae_fast.elbo import ELBOOutput, FusedELBO
from vae_fast.functional import fused_elbo, gaussian_nll, reparameterize, validate
from vae_fast.vae import VAE

__all__ = [
    "VAE",
    "ELBOOutput",
    "FallbackWarning",
    "FusedELBO",
    "backends",
    "functional",
    "fused_elbo",
    "gaussian_nll",
    "noise",
    "reference",
    "reparameterize",
    "use_backend",
    "validate",
]
