"""The reference against torch.distributions, in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal

from vae_fast import noise, ops, reference

SIGMA = {
    "logvar": lambda s: torch.exp(0.5 * s),
    "logstd": torch.exp,
    "std": lambda s: s,
    "var": torch.sqrt,
    "softplus": F.softplus,
}


def raw_scale(shape):
    return (torch.rand(shape, dtype=torch.float64) + 0.2).requires_grad_()


def assert_same(ours, theirs, inputs):
    for o, t in zip(ours, theirs):
        torch.testing.assert_close(o, t, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad([o.square().sum() for o in ours], inputs)
    theirs = torch.autograd.grad([t.square().sum() for t in theirs], inputs)
    for o, t in zip(ours, theirs):
        torch.testing.assert_close(o, t, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("param", ops.PARAMS)
@pytest.mark.parametrize("num_samples", [None, 1, 3])
@pytest.mark.parametrize("clamp", [None, (0.4, 0.9)])
def test_reparameterize(param, num_samples, clamp, key):
    mu = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    s = raw_scale(mu.shape)
    ours = reference.reparameterize(mu, s, param, num_samples, key, clamp=clamp)

    sigma = SIGMA[param](s if clamp is None else s.clamp(*clamp))
    eps = noise.normal(key, 4, num_samples, (2, 3), dtype=torch.float64)
    q, z = Normal(mu, sigma), mu + sigma * eps
    theirs = (z, q.log_prob(z).sum((-2, -1)), Normal(0.0, 1.0).log_prob(z).sum((-2, -1)))
    assert_same(ours, theirs, (mu, s))


@pytest.mark.parametrize("param", ops.PARAMS)
@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("clamp", [None, (0.4, 0.9)])
@pytest.mark.parametrize("scalar", [False, True])
def test_gaussian_nll(param, num_samples, clamp, scalar):
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    shape = x.shape if num_samples is None else (num_samples, *x.shape)
    mean = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    s = raw_scale(() if scalar else shape)
    ours = reference.gaussian_nll(x, mean, s, param, clamp)
    tau = SIGMA[param](s if clamp is None else s.clamp(*clamp))
    theirs = -Normal(mean, tau).log_prob(x).sum((-2, -1))
    assert_same([ours], [theirs], (x, mean, s))


def test_packed_is_the_mean_then_the_scale():
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    packed = torch.randn(4, 4, 3, dtype=torch.float64)
    mean, logvar = packed.chunk(2, 1)
    torch.testing.assert_close(
        reference.gaussian_nll(x, packed, None), reference.gaussian_nll(x, mean, logvar)
    )


def test_mask_drops_elements_and_their_nans():
    x = torch.randn(5, 6, dtype=torch.float64)
    mask = torch.rand(5, 6) > 0.4
    broken = torch.where(mask, x, torch.nan).requires_grad_()
    mean = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    s = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    nll = reference.gaussian_nll(broken, mean, s, mask=mask)
    each = -Normal(mean, torch.exp(0.5 * s)).log_prob(x)
    torch.testing.assert_close(nll, torch.stack([e[m].sum() for e, m in zip(each, mask)]))
    for g in torch.autograd.grad(nll.sum(), (broken, mean, s)):
        assert torch.all(g[~mask] == 0)
        assert torch.all(torch.isfinite(g))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype, key):
    mu = torch.randn(3, 4).to(dtype)
    z, log_q, log_p = reference.reparameterize(mu, mu, key=key)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    assert (z.dtype, log_q.dtype, log_p.dtype) == (dtype, acc, acc)
    assert reference.gaussian_nll(mu, mu, mu).dtype == acc


@pytest.mark.parametrize("param", ["logvar", "logstd", "softplus"])
def test_extreme_scales_in_fp32(param):
    """Finite wherever the exact result is; the tail of softplus keeps log σ = s."""
    s = torch.tensor([[-300.0], [-100.0], [60.0]], requires_grad=True)
    x = torch.zeros(3, 1)
    nll = reference.gaussian_nll(x, x, s, param)
    nll.sum().backward()
    log_tau = {"logvar": s / 2, "logstd": s, "softplus": F.softplus(s.double()).log()}[param]
    torch.testing.assert_close(nll.double(), log_tau[:, 0].double() + reference.HALF_LOG_2PI)
    assert torch.all(torch.isfinite(s.grad))


def test_unknown_param_is_refused():
    with pytest.raises(ValueError, match="param must be one of"):
        reference.gaussian_nll(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), "sigma")


def test_elbo_loss_is_the_mean_over_samples():
    nll, log_q, log_p = torch.randn(3, 2, 5, dtype=torch.float64).unbind(0)
    rows = (nll + 0.5 * (log_q - log_p)).mean(0)
    torch.testing.assert_close(reference.elbo_loss(nll, log_q, log_p, 0.5), rows.mean())
    torch.testing.assert_close(reference.elbo_loss(nll, log_q, log_p, 0.5, "sum"), rows.sum())
    torch.testing.assert_close(reference.elbo_loss(nll, log_q, log_p, 0.5, "none"), rows)
