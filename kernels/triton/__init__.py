"""The Triton kernels. Importing this package needs Triton; ``vae_fast`` itself does not."""

from .latent import latent_backward, latent_forward
from .likelihood import (
    likelihood_backward,
    likelihood_forward,
    likelihood_forward_grad,
    likelihood_rescale_,
)

__all__ = [
    "latent_backward",
    "latent_forward",
    "likelihood_backward",
    "likelihood_forward",
    "likelihood_forward_grad",
    "likelihood_rescale_",
]
