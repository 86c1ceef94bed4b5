"""The loss of a variational autoencoder as a module: two fused passes around the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vae_fast import functional, ops

__all__ = ["ELBOOutput", "FusedELBO"]

KL_ESTIMATORS = ("monte_carlo",)


class ELBOOutput(NamedTuple):
    """A loss and the terms it is made of, in nats.

    Rows have shape (B,), or (K, B) for K > 1 samples.
    """

    loss: Tensor
    """Negative ELBO, 0-dim, or (B,) for ``reduction="none"``."""
    nll: Tensor
    """−log p(x|z) per row."""
    log_q: Tensor
    """log q(z|x) per row."""
    log_p: Tensor
    """log p(z) per row."""
    z: Tensor
    """The latent sample, (B, *latent) or (K, B, *latent)."""

    @property
    def kl(self) -> Tensor:
        """The Monte Carlo estimate log q(z|x) − log p(z) of KL(q‖p) per row, unweighted by β."""
        return self.log_q - self.log_p


class FusedELBO(nn.Module):
    """Negative evidence lower bound of a VAE with Gaussian posterior, prior and likelihood.

    loss = E_q[−log p(x|z)] + β·E_q[log q(z|x) − log p(z)], by Monte Carlo with K samples (Kingma
    and Welling 2014, eq. 3; β as in Higgins et al. 2017, eq. 4). Two fused passes, one on each side
    of the decoder, in the forward and in the backward direction.

    Args:
        beta: weight of the KL term.
        num_samples: K, latent samples per row.
        posterior_param: what the posterior's raw scale means: ``"logvar"``, ``"logstd"``,
            ``"std"``, ``"var"`` or ``"softplus"`` (:func:`vae_fast.reparameterize`).
        likelihood_param: the same for the decoder's raw scale.
        kl: how KL(q‖p) is estimated: ``"monte_carlo"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the batch.
        posterior_clamp: (lo, hi) for the posterior's raw scale, as ``torch.clamp``.
        likelihood_clamp: (lo, hi) for the decoder's raw scale, as ``torch.clamp``.
        inplace: overwrite the decoder's output with its gradient
            (:func:`vae_fast.functional.fused_elbo` says when that is possible).

    Raises:
        ValueError: an argument is not one of those listed, or K < 1, or lo > hi.
    """

    def __init__(
        self,
        beta: float = 1.0,
        num_samples: int = 1,
        posterior_param: str = "logvar",
        likelihood_param: str = "logvar",
        kl: str = "monte_carlo",
        reduction: str = "mean",
        posterior_clamp: tuple[float, float] | None = None,
        likelihood_clamp: tuple[float, float] | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        functional._check_count("num_samples", num_samples)
        functional._check_param("posterior_param", posterior_param)
        functional._check_param("likelihood_param", likelihood_param)
        functional._check_clamp("posterior_clamp", posterior_clamp)
        functional._check_clamp("likelihood_clamp", likelihood_clamp)
        functional._check_choice("reduction", reduction, dict.fromkeys(ops.REDUCTIONS, 0))
        if kl not in KL_ESTIMATORS:
            raise ValueError(f"kl must be one of {', '.join(KL_ESTIMATORS)}; got {kl!r}")
        self.beta = beta
        self.num_samples = num_samples
        self.posterior_param = posterior_param
        self.likelihood_param = likelihood_param
        self.kl = kl
        self.reduction = reduction
        self.posterior_clamp = posterior_clamp
        self.likelihood_clamp = likelihood_clamp
        self.inplace = inplace

    def forward(
        self,
        x: Tensor,
        mu: Tensor,
        scale: Tensor,
        decoder: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]],
        *,
        key: Tensor | None = None,
        generator: torch.Generator | None = None,
        first_row: int = 0,
    ) -> ELBOOutput:
        """Sample z, decode it, and return the loss with its terms.

        Args:
            x: data, (B, *event).
            mu: posterior means, (B, *latent).
            scale: the posterior's raw scale, broadcastable to ``mu`` or 0-dim.
            decoder: called once with z of shape (K·B, *latent); returns (mean, scale) of p(x|z),
                mean (K·B, *event) and scale broadcastable to it or 0-dim, or one tensor packed
                along dimension 1, mean first.
            key, generator, first_row: the noise, as in :func:`vae_fast.reparameterize`.

        Raises:
            TypeError, ValueError: as :func:`vae_fast.reparameterize` and
                :func:`vae_fast.functional.fused_elbo`.
        """
        samples = self.num_samples if self.num_samples > 1 else None
        z, log_q, log_p = functional.reparameterize(
            mu,
            scale,
            self.posterior_param,
            samples,
            key,
            generator,
            first_row,
            self.posterior_clamp,
        )
        output = decoder(z if samples is None else z.flatten(0, 1))
        mean, likelihood_scale = _mean_and_scale(output)
        if self.inplace and not torch.compiler.is_compiling():
            _check_not_latent(z, mean, likelihood_scale)
        loss, nll = functional.fused_elbo(
            x,
            mean,
            likelihood_scale,
            log_q,
            log_p,
            self.beta,
            self.reduction,
            self.likelihood_param,
            self.likelihood_clamp,
            None,
            self.inplace,
        )
        return ELBOOutput(loss, nll, log_q, log_p, z)

    def extra_repr(self) -> str:
        """Every option, for ``repr``."""
        return (
            f"beta={self.beta}, num_samples={self.num_samples}, "
            f"posterior_param={self.posterior_param!r}, "
            f"likelihood_param={self.likelihood_param!r}, kl={self.kl!r}, "
            f"reduction={self.reduction!r}, posterior_clamp={self.posterior_clamp}, "
            f"likelihood_clamp={self.likelihood_clamp}, inplace={self.inplace}"
        )


def _mean_and_scale(output: object) -> tuple[Tensor, Tensor | None]:
    if isinstance(output, Tensor):
        return output, None
    if isinstance(output, (tuple, list)) and len(output) == 2:
        packed = _packed(output[0], output[1])
        return (output[0], output[1]) if packed is None else (packed, None)
    raise TypeError(
        "decoder must return (mean, scale), or one tensor packed along dimension 1; got "
        f"{type(output).__name__}"
    )


def _packed(mean: object, scale: object) -> Tensor | None:
    """The tensor whose dimension 1 was split into (mean, scale), if that is what happened.

    Reading it packed gives it one packed gradient, where the split's own backward pass would
    concatenate two. Not if somebody watches the halves' gradients.
    """
    if torch.compiler.is_compiling() or type(mean) is not Tensor or (base := mean._base) is None:
        return None
    if type(scale) is not Tensor or base is not scale._base:
        return None
    if base.dim() != mean.dim() or mean.dim() < 2:
        return None
    watched = any(t._backward_hooks or t.retains_grad for t in (mean, scale))
    half = mean.shape[1]
    fits = (
        mean.shape == scale.shape
        and base.shape == (mean.shape[0], 2 * half, *mean.shape[2:])
        and mean.stride() == scale.stride() == base.stride()
        and mean.storage_offset() == base.storage_offset()
        and scale.storage_offset() == base.storage_offset() + half * base.stride(1)
    )
    return base if fits and not watched else None


def _check_not_latent(z: Tensor, mean: Tensor, scale: Tensor | None) -> None:
    for name, t in (("mean", mean), ("scale", scale)):
        if isinstance(t, Tensor) and functional._same_storage(t, z):
            raise ValueError(f"inplace=True would overwrite z, whose memory {name} shares")
