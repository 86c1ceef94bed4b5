"""The loss given a decoder's output, as different people write it.

Every implementation is a function (x, mu, logvar, decode) -> loss, the batch mean of
−log p(x|z) + log q(z|x) − log p(z) with z drawn by itself, so that its noise is part of its time.
``decode`` takes z and returns (mean, logvar).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Normal

import vae_fast

LOG_2PI = math.log(2 * math.pi)
Loss = Callable[[Tensor, Tensor, Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]], Tensor]


def eager(x, mu, logvar, decode):
    """Plain PyTorch, written with care: no term is computed twice."""
    eps = torch.randn_like(mu)
    z = mu + torch.exp(0.5 * logvar) * eps
    mean, s = decode(z)
    log_q = -0.5 * (eps.square() + logvar + LOG_2PI).sum(1)
    log_p = -0.5 * (z.square() + LOG_2PI).sum(1)
    nll = 0.5 * ((x - mean).square() * torch.exp(-s) + s + LOG_2PI).sum(1)
    return (nll + log_q - log_p).mean()


def distributions(x, mu, logvar, decode):
    """torch.distributions, argument validation off."""
    q = Normal(mu, torch.exp(0.5 * logvar), validate_args=False)
    z = q.rsample()
    mean, s = decode(z)
    prior = Normal(torch.zeros_like(mu), torch.ones_like(mu), validate_args=False)
    likelihood = Normal(mean, torch.exp(0.5 * s), validate_args=False)
    log_ratio = q.log_prob(z).sum(1) - prior.log_prob(z).sum(1)
    return (log_ratio - likelihood.log_prob(x).sum(1)).mean()


def fused(inplace: bool) -> Loss:
    """vae_fast.FusedELBO."""
    elbo = vae_fast.FusedELBO(inplace=inplace)
    return lambda x, mu, logvar, decode: elbo(x, mu, logvar, decode).loss


def compiled() -> Loss:
    """torch.compile of the eager loss, for one shape."""
    return torch.compile(eager, dynamic=False)


OURS = ("vae_fast", "vae_fast inplace")
IMPLEMENTATIONS: dict[str, Callable[[], Loss]] = {
    "eager": lambda: eager,
    "torch.compile": compiled,
    "distributions": lambda: distributions,
    "vae_fast": lambda: fused(inplace=False),
    "vae_fast inplace": lambda: fused(inplace=True),
}


class _Decoded(torch.autograd.Function):
    """Stands for a decoder: hands out its output, and takes the output's gradient."""

    @staticmethod
    def forward(ctx, z, case):
        ctx.case = case
        return case.mean.detach(), case.logvar_x.detach()

    @staticmethod
    def backward(ctx, g_mean, g_logvar):
        ctx.case.g_mean, ctx.case.g_logvar_x = g_mean, g_logvar
        return None, None


class Case:
    """Tensors of one size, and one step of a loss on them."""

    def __init__(self, batch: int, latent: int, data: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.batch, self.latent, self.data, self.dtype = batch, latent, data, dtype
        self.x = torch.randn(batch, data).to(dtype)
        self.mu = torch.randn(batch, latent).to(dtype).requires_grad_()
        self.logvar = (torch.randn(batch, latent) - 1).to(dtype).requires_grad_()
        self._mean = torch.randn(batch, data).to(dtype)
        self._logvar_x = (0.5 * torch.randn(batch, data)).to(dtype)
        self.mean, self.logvar_x = torch.empty_like(self._mean), torch.empty_like(self._mean)
        self.reset()

    def reset(self) -> None:
        """Before every step: new decoder outputs (one may have been overwritten), no gradients."""
        self.mean.copy_(self._mean)
        self.logvar_x.copy_(self._logvar_x)
        self.mu.grad = self.logvar.grad = self.g_mean = self.g_logvar_x = None

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if z.requires_grad:
            return _Decoded.apply(z, self)
        return self.mean, self.logvar_x

    def forward(self, loss: Loss) -> Tensor:
        with torch.no_grad():
            return loss(self.x, self.mu, self.logvar, self.decode)

    def forward_backward(self, loss: Loss) -> Tensor:
        value = loss(self.x, self.mu, self.logvar, self.decode)
        value.backward()
        return value

    def bytes_moved(self, phase: str) -> int:
        """The bytes that a step cannot avoid: each input read once, each result written once.

        Latent pass: μ and the scale in, z out, and for the backward pass μ, the scale and z's
        gradient in, two gradients out. Likelihood pass: x, mean and scale in, two gradients out.
        """
        size = self.mu.element_size()
        small, large = self.batch * self.latent * size, self.batch * self.data * size
        return 3 * small + 3 * large if phase == "forward" else 8 * small + 5 * large

    def check(self, loss: Loss, phase: str) -> None:
        """Raise AssertionError unless the loss and all four gradients are right.

        The noise is the implementation's own; it is recovered from the gradient of μ, which is z/B
        here, must be standard normal, and must explain the gradient of log σ² and the loss.
        """
        exact = 1e-4 if self.dtype == torch.float32 else 0.1
        x, mean, s = self.x.double(), self._mean.double(), self._logvar_x.double()
        mu, logvar = self.mu.detach().double(), self.logvar.detach().double()
        r2 = (x - mean).square() * torch.exp(-s)
        nll = 0.5 * (r2 + s + LOG_2PI).sum(1).mean()
        self.reset()
        if phase == "forward":
            value = self.forward(loss).double()
            kl = 0.5 * (mu.square() + logvar.exp() - logvar - 1).sum(1).mean()
            # One sample per row: the estimate of KL scatters around it.
            spread = 6 * (3 * self.latent / self.batch) ** 0.5
            assert abs(value - nll - kl) < spread + exact * abs(nll), (value, nll, kl)
            return
        value = self.forward_backward(loss).double()
        sigma = torch.exp(0.5 * logvar)
        z = self.mu.grad.double() * self.batch
        eps = (z - mu) / sigma
        n = eps.numel()
        if self.dtype == torch.float32:
            assert abs(eps.mean()) < 6 / n**0.5 + 1e-4
            assert abs(eps.square().mean() - 1) < 6 * (2 / n) ** 0.5 + 1e-3
        log_ratio = 0.5 * (z.square() - eps.square() - logvar).sum(1).mean()
        expected = {
            "loss": (value, nll + log_ratio),
            "logvar": (self.logvar.grad * self.batch, 0.5 * (sigma * eps * z - 1)),
            "decoder mean": (self.g_mean * self.batch, (mean - x) * torch.exp(-s)),
            "decoder scale": (self.g_logvar_x * self.batch, 0.5 * (1 - r2)),
        }
        for name, (got, want) in expected.items():
            error = (got.double() - want).abs().max() / want.abs().max()
            assert error < exact, f"{name}: relative error {error:.2g}"
