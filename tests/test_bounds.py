"""Outside truths for the objectives: factor analysis, probabilistic PCA, and unbiased gradients."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA, FactorAnalysis
from torch import nn

import vae_fast

LATENT = 10


def test_linear_vae_with_a_variance_per_feature_reaches_factor_analysis():
    """At its optimum its ELBO equals factor analysis's exact log-likelihood, the posterior being
    diagonal in some rotation of the latent (Tipping and Bishop 1999, section 2).
    """
    data = load_digits().data[:1400] / 16
    data = data + np.random.default_rng(0).normal(0.0, 0.05, data.shape)
    exact = FactorAnalysis(LATENT, tol=1e-4, max_iter=5000).fit(data).score(data)

    # Standardised, which changes the log-likelihood by Σ log std and makes for short training.
    torch.manual_seed(0)
    x = torch.tensor((data - data.mean(0)) / data.std(0), dtype=torch.float32)
    encoder = nn.Linear(64, LATENT, bias=False)
    decoder = nn.Linear(LATENT, 64, bias=False)
    posterior_logvar = nn.Parameter(torch.zeros(LATENT))
    likelihood_logvar = nn.Parameter(torch.zeros(64))  # one per feature, shared by the batch
    networks = [*encoder.parameters(), *decoder.parameters()]
    steps = 1000
    optimizer = torch.optim.Adam([*networks, posterior_logvar, likelihood_logvar], lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-5)
    elbo = vae_fast.FusedELBO(estimator="stl")

    def evidence():
        decode = lambda z: (decoder(z), likelihood_logvar)  # noqa: E731
        return -elbo(x, encoder(x), posterior_logvar, decode).loss - np.log(data.std(0)).sum()

    for _ in range(steps):
        optimizer.zero_grad()
        (-evidence()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        reached = torch.stack([evidence() for _ in range(100)])
    assert reached.std() / 100**0.5 < 0.01
    assert reached.mean().item() == pytest.approx(exact, abs=0.1)


def probabilistic_pca():
    """Digits, the model's W, mean and σ² (Tipping and Bishop 1999, eq. 7 and 8), and its score."""
    data = load_digits().data[:1400] / 16
    pca = PCA(LATENT).fit(data)
    variance = pca.noise_variance_
    w = pca.components_.T * np.sqrt(pca.explained_variance_ - variance)
    tensors = (torch.tensor(t, dtype=torch.float32) for t in (data, w, pca.mean_))
    return *tensors, float(variance), pca.score(data)


def test_iwae_rises_towards_the_exact_log_likelihood_and_does_not_pass_it():
    x, w, mean, variance, exact = probabilistic_pca()
    # The exact posterior is diagonal here; a shifted and widened one leaves a gap to close.
    m = (w * w).sum(0) + variance
    mu = (x - mean) @ w / m * 0.97
    logvar = (variance / m).log() + 0.7
    decode = lambda z: (z @ w.T + mean, torch.tensor(variance).log())  # noqa: E731
    bounds, errors = [], []
    for samples in (1, 8, 64):
        elbo = vae_fast.FusedELBO(num_samples=samples, objective="iwae", reduction="none")
        torch.manual_seed(samples)
        rows = torch.stack([-elbo(x, mu, logvar, decode).loss for _ in range(16)])
        bounds.append(rows.mean().item())
        errors.append(rows.mean(1).std().item() / 16**0.5)
    assert max(errors) < 0.04
    assert bounds[0] + 0.3 < bounds[1] < bounds[2] - 0.05
    assert bounds[2] < exact + 4 * errors[2]
    assert bounds[2] > exact - 0.5 * (exact - bounds[0])


def gradients(estimator, objective, samples, beta, mu, logvar, draws, key):
    """Gradients of a data point's posterior, (draws, 2L), each draw by itself; the decoder's."""
    g = torch.Generator().manual_seed(7)
    w = torch.randn(6, 3, generator=g, dtype=torch.float64)
    x = torch.randn(6, generator=g, dtype=torch.float64).expand(draws, 6)
    w.requires_grad_()
    mu = mu.expand(draws, 3).contiguous().requires_grad_()
    logvar = logvar.expand(draws, 3).contiguous().requires_grad_()
    elbo = vae_fast.FusedELBO(
        beta, num_samples=samples, objective=objective, estimator=estimator, reduction="sum"
    )
    decode = lambda z: (z @ w.T, torch.zeros((), dtype=torch.float64))  # noqa: E731
    loss = elbo(x, mu, logvar, decode, key=key).loss
    g_mu, g_logvar, g_w = torch.autograd.grad(loss, (mu, logvar, w))
    return torch.cat([g_mu, g_logvar], 1), g_w


def exact_posterior():
    """Means and log-variances of the best diagonal posterior of the data point in ``gradients``."""
    g = torch.Generator().manual_seed(7)
    w = torch.randn(6, 3, generator=g, dtype=torch.float64)
    x = torch.randn(6, generator=g, dtype=torch.float64)
    precision = torch.eye(3, dtype=torch.float64) + w.T @ w
    return torch.linalg.solve(precision, w.T @ x), -precision.diagonal().log()


@pytest.mark.parametrize(
    ("estimator", "objective", "samples", "beta"),
    [
        ("stl", "elbo", 1, 1.0),
        ("stl", "elbo", 3, 0.5),
        ("dreg", "iwae", 8, 1.0),
        ("dreg", "iwae", 4, 0.5),
        ("dreg", "iwae", 4, torch.tensor(2.0)),
    ],
)
def test_estimators_agree_in_expectation_and_vary_less(estimator, objective, samples, beta, key):
    best_mu, best_logvar = exact_posterior()
    draws = 200_000
    far = best_mu + 0.5, best_logvar + 0.4
    plain, plain_w = gradients("standard", objective, samples, beta, *far, draws, key)
    other, other_w = gradients(estimator, objective, samples, beta, *far, draws, key)
    # The same noise, so the difference of the two has an error of its own.
    difference = plain - other
    error = difference.std(0) / draws**0.5
    assert torch.all(difference.mean(0).abs() < 5 * error)
    # Enough samples to see a bias of a tenth of the gradient.
    assert torch.all(5 * error < 0.1 * plain.mean(0).abs().max())
    # The decoder's gradient is the plain one.
    torch.testing.assert_close(other_w, plain_w)

    near = best_mu + 0.01, best_logvar + 0.01
    plain, _ = gradients("standard", objective, samples, beta, *near, 20_000, key)
    other, _ = gradients(estimator, objective, samples, beta, *near, 20_000, key)
    if beta == 1.0:  # where the optimum is the exact posterior
        assert other.var(0).sum() < 0.7 * plain.var(0).sum()
