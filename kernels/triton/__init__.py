"""The Triton kernels. Importing this package needs Triton; ``vae_fast`` itself does not."""

from .importance import importance_forward
from .kl import gaussian_kl_backward, gaussian_kl_forward
from .latent import latent_backward, latent_forward
from .likelihood import (
    likelihood_backward,
    likelihood_forward,
    likelihood_forward_grad_,
    likelihood_rescale_,
)

__all__ = [
    "gaussian_kl_backward",
    "gaussian_kl_forward",
    "importance_forward",
    "latent_backward",
    "latent_forward",
    "likelihood_backward",
    "likelihood_forward",
    "likelihood_forward_grad_",
    "likelihood_rescale_",
]
