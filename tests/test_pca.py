"""An outside truth: a linear VAE with one learned σ is probabilistic PCA.

At its optimum its ELBO equals the exact log-likelihood (Lucas et al. 2019, "Don't blame the ELBO!";
Tipping and Bishop 1999), which scikit-learn computes in closed form.
"""

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import nn

import vae_fast

LATENT = 10


def test_linear_vae_reaches_probabilistic_pca():
    data = load_digits().data[:1400] / 16
    exact = PCA(LATENT).fit(data).score(data)
    assert exact == pytest.approx(17.614, abs=1e-3)

    torch.manual_seed(0)
    x = torch.tensor(data, dtype=torch.float32)
    encoder, decoder = nn.Linear(64, LATENT), nn.Linear(LATENT, 64)
    posterior_logvar = nn.Parameter(torch.zeros(LATENT))
    likelihood_logvar = nn.Parameter(torch.zeros(()))
    with torch.no_grad():
        decoder.bias.copy_(x.mean(0))
        encoder.bias.copy_(-encoder.weight @ x.mean(0))
    parameters = [
        *encoder.parameters(),
        *decoder.parameters(),
        posterior_logvar,
        likelihood_logvar,
    ]
    steps = 4000
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-5)
    elbo = vae_fast.FusedELBO()

    def evidence(key=None):
        mu = encoder(x)
        decode = lambda z: (decoder(z), likelihood_logvar)  # noqa: E731
        return -elbo(x, mu, posterior_logvar, decode, key=key).loss

    for _ in range(steps):
        optimizer.zero_grad()
        (-evidence()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        reached = torch.stack([evidence() for _ in range(200)])
    # 200 evaluations of 1400 images leave a Monte Carlo error far below the tolerance.
    assert reached.std() / 200**0.5 < 0.003
    assert reached.mean().item() == pytest.approx(exact, abs=0.03)
