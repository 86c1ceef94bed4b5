"""How wrong a result may be: as wrong as eager PyTorch itself, against an fp64 truth."""

import math

import torch
import torch.nn.functional as F

from vae_fast import backends

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)

SIGMA = {
    "logvar": lambda s: torch.exp(0.5 * s),
    "logstd": torch.exp,
    "std": lambda s: s,
    "var": torch.sqrt,
    "softplus": F.softplus,
}


def eager_latent(mu, s, eps, param, clamp=None):
    """The latent terms as one writes them by hand, in the dtype of the inputs."""
    sigma = SIGMA[param](s if clamp is None else s.clamp(*clamp))
    eps = eps.to(mu.dtype)
    z = mu + sigma * eps
    event = tuple(range(z.dim() - mu.dim() + 1, z.dim()))
    log_q = -(0.5 * eps.square() + torch.log(sigma) + HALF_LOG_2PI).sum(event)
    return z, log_q, -(0.5 * z.square() + HALF_LOG_2PI).sum(event)


def eager_nll(x, mean, s, param, clamp=None, mask=None):
    """The negative log-likelihood as one writes it by hand, in the dtype of the inputs."""
    tau = SIGMA[param](s if clamp is None else s.clamp(*clamp))
    value = 0.5 * ((x - mean) / tau).square() + torch.log(tau) + HALF_LOG_2PI
    if mask is not None:
        value = torch.where(mask, value, 0.0)
    return value.sum(tuple(range(mean.dim() - x.dim() + 1, mean.dim())))


def is_interpreted(device):
    """Whether Triton's interpreter runs the kernels: slowly, and bf16 by truncation."""
    return device.type == "cpu" and backends.backend_for("cpu") == "triton"


def error(value, truth):
    if truth.numel() == 0:
        return 0.0
    return (value.double().cpu() - truth.double().cpu()).abs().max().item()


def assert_accurate(ours, eager, truth, dtype, truncates=False):
    """The rule of the project: twice eager's own error plus 1e-6 relative in fp32; eager's own
    error in half precision; 1e-12 relative in fp64.

    ``truncates``: bf16 results were cut off and not rounded, as Triton's interpreter does, so
    they may be wrong by a whole unit in the last place.
    """
    names = "results and gradients"
    assert len(ours) == len(eager) == len(truth)
    for i, (o, e, t) in enumerate(zip(ours, eager, truth)):
        assert o.shape == t.shape, f"{names}[{i}]: {tuple(o.shape)} != {tuple(t.shape)}"
        scale = max(t.abs().max().item(), 1e-30) if t.numel() else 1.0
        if dtype == torch.float64:
            bound = 1e-12 * scale
        elif dtype == torch.float32:
            bound = 2 * error(e, t) + 1e-6 * scale
        else:
            bound = error(e, t) + 1e-6 * scale
        if truncates:
            bound = max(bound, 2.0**-7 * scale)
        assert error(o, t) <= bound, (
            f"{names}[{i}]: error {error(o, t):.3g} > {bound:.3g} ({dtype})"
        )
