"""The ``VAE`` module: its loss, its methods, its files."""

import copy
import inspect
import itertools
import json
import math
import os
import struct
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import (
    Bernoulli,
    Independent,
    Laplace,
    MultivariateNormal,
    Normal,
    StudentT,
)

import vae_fast
from vae_fast import VAE, FusedELBO, reference

EVENTS = [(5,), (1, 8, 8), (3, 4, 2, 2)]
KEY = torch.tensor([7, 3], dtype=torch.uint64)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small(variance="full", event=(1, 8, 8), latent=3, **options):
    return VAE.mlp(event, latent, hidden=(16,), variance=variance, **options)


def std_of(scale, like):
    return torch.exp(0.5 * scale).expand_as(like)


def constant(mean, scale=None, **options):
    """A model whose p(x|z) is the same for every z and x."""

    def decoder(z):
        m = mean.expand(len(z), *mean.shape)
        return m if scale is None else (m, torch.tensor(scale))

    return VAE(nn.Linear(mean.numel(), 4), decoder, 2, **options)


class TwoHeads(nn.Module):
    """A network that returns a pair."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.first(x), self.second(x)


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("variance", ["full", "scalar", "unit"])
def test_loss_is_the_negative_elbo_of_torch_distributions(variance, event, samples):
    beta = 0.7
    vae = small(variance, event, num_samples=samples, beta=beta).double()
    x = torch.rand(6, *event, dtype=torch.float64)
    out = vae(x)

    mu, logvar = vae.encode(x)
    q = Independent(Normal(mu, std_of(logvar, mu)), 1)
    p = Independent(Normal(torch.zeros_like(mu), 1.0), 1)
    assert out.z.shape == ((6, 3) if samples == 1 else (samples, 6, 3))
    z = out.z.reshape(samples, 6, 3)
    mean, scale = vae.decode(z.flatten(0, 1))
    assert mean.shape == (samples * 6, *event)
    assert scale.shape == (mean.shape if variance == "full" else ())
    if variance == "unit":
        assert torch.equal(std_of(scale, mean), torch.ones_like(mean))
    rows = Normal(mean, std_of(scale, mean)).log_prob(x.repeat(samples, *(1,) * len(event)))
    nll = -rows.flatten(1).sum(1).reshape(samples, 6)
    kl = q.log_prob(z) - p.log_prob(z)

    torch.testing.assert_close(out.nll.reshape(samples, 6), nll)
    torch.testing.assert_close(out.kl.reshape(samples, 6), kl)
    torch.testing.assert_close(out.loss, (nll + beta * kl).mean())


@pytest.mark.parametrize("variance", ["full", "scalar", "unit"])
def test_every_parameter_learns(variance):
    vae = small(variance)
    vae(torch.rand(6, 1, 8, 8)).loss.backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    learned = [name for name, p in vae.named_parameters() if p.dim() == 0]
    assert learned == (["decoder.scale"] if variance == "scalar" else [])


def test_pairs_and_packed_outputs_give_the_same_loss():
    a, b, c, d = nn.Linear(6, 2), nn.Linear(6, 2), nn.Linear(2, 6), nn.Linear(2, 6)

    class Packed(nn.Module):
        def __init__(self, pair):
            super().__init__()
            self.pair = pair

        def forward(self, x):
            return torch.cat(self.pair(x), 1)

    encoder, decoder = TwoHeads(a, b), TwoHeads(c, d)
    x = torch.rand(5, 6)
    losses, grads = [], []
    for e in (encoder, Packed(encoder)):
        for f in (decoder, Packed(decoder)):
            vae = VAE(e, f, 2)
            vae.zero_grad()
            loss = vae(x, key=KEY).loss
            loss.backward()
            losses.append(loss.detach())
            grads.append(
                torch.cat([p.grad.flatten() for m in (a, b, c, d) for p in m.parameters()])
            )
            assert [t.shape for t in vae.encode(x)] == [(5, 2), (5, 2)]
            assert [t.shape for t in vae.decode(torch.zeros(5, 2))] == [(5, 6), (5, 6)]
    for loss, grad in zip(losses[1:], grads[1:], strict=True):
        torch.testing.assert_close(loss, losses[0])
        torch.testing.assert_close(grad, grads[0])


def test_a_latent_of_several_dimensions():
    vae = VAE(nn.Conv2d(1, 4, 1), nn.Conv2d(2, 2, 1), (2, 3, 5))
    x = torch.rand(4, 1, 3, 5)
    assert vae(x).z.shape == (4, 2, 3, 5)
    assert vae.sample(7).shape == (7, 1, 3, 5)
    assert vae.interpolate(x, x.flip(0), steps=3).shape == (3, 4, 1, 3, 5)


@pytest.mark.parametrize("param", ["logvar", "logstd", "softplus"])
@pytest.mark.parametrize("variance", ["scalar", "unit"])
def test_one_scale_starts_at_a_standard_deviation_of_one(param, variance):
    vae = small(variance, likelihood_param=param, posterior_param=param)
    x = torch.rand(4, 1, 8, 8)
    out = vae(x)
    mean, _ = vae.decode(out.z)
    nll = -Normal(mean, 1.0).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(out.nll, nll, rtol=1e-5, atol=1e-4)


def test_the_loss_is_the_same_under_the_reference_backend():
    vae = small(num_samples=2)
    x = torch.rand(6, 1, 8, 8)
    names = [name for name, _ in vae.named_parameters()]
    results = []
    before = copy.deepcopy(vae.state_dict())
    other = small(num_samples=2)
    other.load_state_dict(before)
    for model, backend in ((vae, None), (other, "reference")):
        if backend is None:
            out = model(x, key=KEY)
            out.loss.backward()
        else:
            with vae_fast.use_backend(backend):
                out = model(x, key=KEY)
                out.loss.backward()
        results.append((out.loss.detach(), [p.grad for p in model.parameters()]))
    (loss, grads), (expected, expected_grads) = results
    torch.testing.assert_close(loss, expected)
    for name, grad, want in zip(names, grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-4, msg=name)


def test_in_place_gradients_are_the_same():
    x = torch.rand(6, 1, 8, 8)
    vae = small()
    twin = small(inplace=True)
    twin.load_state_dict(vae.state_dict())
    for model in (vae, twin):
        model(x, key=KEY).loss.backward()
    for one, two in zip(vae.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_a_key_fixes_the_noise_and_first_row_makes_it_independent_of_the_split():
    vae = small(reduction="none")
    x = torch.rand(10, 1, 8, 8)
    whole = vae(x, key=KEY)
    parts = [vae(x[i : i + 4], key=KEY, first_row=i) for i in (0, 4, 8)]
    torch.testing.assert_close(torch.cat([p.z for p in parts]), whole.z)
    torch.testing.assert_close(torch.cat([p.loss for p in parts]), whole.loss)
    assert not torch.allclose(vae(x).z, whole.z)
    first = vae(x, generator=torch.Generator().manual_seed(5)).z
    assert torch.equal(first, vae(x, generator=torch.Generator().manual_seed(5)).z)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_follows_the_dtype_of_the_networks(dtype):
    vae = small().to(dtype)
    x = torch.rand(4, 1, 8, 8).to(dtype)
    out = vae(x)
    out.loss.backward()
    assert out.z.dtype == dtype
    for result in (vae.sample(3), vae.sample(3, noise=True), vae.reconstruct(x)):
        assert result.dtype == dtype
        assert result.isfinite().all()
    assert all(p.grad.dtype == dtype for p in vae.parameters())


# ---------------------------------------------------------------- options of the loss


def test_every_option_of_the_loss_is_an_option():
    options = dict(
        beta=0.5, num_samples=3, posterior_param="logstd", likelihood_param="softplus",
        reduction="sum", posterior_clamp=(-3.0, 3.0), likelihood_clamp=(-2.0, 2.0), inplace=True,
        posterior_clamp_mode="soft", likelihood_clamp_mode="soft", likelihood="student_t",
        likelihood_scale=0.5, df=3.0, prior_param="std", x_scale=(0.5, 1.0), dequantize=True,
        kl="analytic", capacity=2.0, objective="elbo", estimator="standard", free_bits=None,
    )  # fmt: skip
    prior = torch.zeros(3), torch.ones(3)
    names = set(inspect.signature(FusedELBO).parameters)
    assert set(options) | {"prior"} == names, "try the new option here, too"
    vae = VAE.mlp((4,), 3, (8,), prior=prior, **options)
    assert vae.elbo.options() == options
    assert vae.elbo.prior_mu is prior[0]
    other = VAE.mlp((4,), 3, (8,), objective="iwae", estimator="dreg", num_samples=2)
    assert (other.elbo.objective, other.elbo.estimator) == ("iwae", "dreg")


def distribution(likelihood, mean, tau):
    return {
        "gaussian": lambda: Normal(mean, tau),
        "laplace": lambda: Laplace(mean, tau),
        "student_t": lambda: StudentT(4.0, mean, tau),
        "bernoulli": lambda: Bernoulli(logits=mean),
    }[likelihood]()


@pytest.mark.parametrize(
    ("likelihood", "model"),
    [
        *itertools.product(
            ("gaussian", "laplace", "student_t"), ("full", "scalar", "channel", "unit", "fixed")
        ),
        ("bernoulli", None),
    ],
)
def test_likelihoods_and_scales_against_torch_distributions(likelihood, model):
    options = dict(likelihood=likelihood)
    if model == "fixed":
        options["likelihood_scale"] = -1.5
    elif likelihood != "bernoulli":
        options["variance"] = model
    vae = VAE.conv((3, 4, 4), 2, (4,), **options).double()
    if model in ("scalar", "channel"):
        with torch.no_grad():
            vae.decoder.scale.copy_(torch.randn_like(vae.decoder.scale))
    x = torch.rand(5, 3, 4, 4, dtype=torch.float64).round(decimals=1)
    out = vae(x, key=KEY)
    mean, scale = vae.decode(out.z)
    if likelihood == "bernoulli":
        assert scale is None
        nll = nn.functional.binary_cross_entropy_with_logits(mean, x, reduction="none")
    else:
        shapes = {"full": mean.shape, "channel": (3, 1, 1)}
        assert scale.shape == shapes.get(model, ())
        nll = -distribution(likelihood, mean, torch.exp(scale / 2)).log_prob(x)
    torch.testing.assert_close(out.nll, nll.flatten(1).sum(1))
    if model == "channel":
        out.loss.backward()
        assert vae.decoder.scale.grad.shape == (3, 1, 1)
        assert (vae.decoder.scale.grad != 0).all()


def test_one_scale_per_feature_of_a_vector():
    vae = VAE.mlp((5,), 2, (8,), variance="channel")
    assert vae.decoder.scale.shape == (5,)
    vae(torch.rand(3, 5)).loss.backward()
    assert (vae.decoder.scale.grad != 0).all()


@pytest.mark.parametrize(
    "options",
    [dict(likelihood="bernoulli"), dict(likelihood_scale=0.1), dict(likelihood_scale="optimal")],
)
@pytest.mark.parametrize("make", [VAE.mlp, VAE.conv])
def test_without_a_scale_the_decoder_outputs_the_mean_alone(make, options):
    vae = make((1, 4, 4), 2, (4,), **options)
    assert vae.decoder(torch.zeros(3, 2)).shape == (3, 1, 4, 4)
    vae(torch.rand(3, 1, 4, 4)).loss.backward()
    for variance in ("full", "unit"):
        with pytest.raises(ValueError, match=f"variance='{variance}' and likelihood"):
            make((1, 4, 4), 2, (4,), variance=variance, **options)
    # What a scale means is of no concern to a network that has none.
    make((1, 4, 4), 2, (4,), likelihood_param="std", **options)


def test_the_optimal_variance_is_the_residuals_and_decode_has_none():
    vae = small(None, likelihood_scale="optimal", likelihood_clamp=None)
    x = torch.rand(6, 1, 8, 8)
    out = vae(x, key=KEY)
    mean, scale = vae.decode(out.z)
    assert scale is None
    sigma = (x - mean).square().mean().sqrt()
    nll = -Normal(mean, sigma).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(out.nll, nll)
    with pytest.raises(ValueError, match="likelihood_scale='optimal' estimates the variance"):
        vae.sample(2, noise=True)
    assert vae.sample(2).shape == (2, 1, 8, 8)


def test_uint8_data_are_scaled_for_the_encoder_and_given_to_the_loss_as_they_are():
    levels = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    for options, (a, b) in (({}, (1 / 255, 0.0)), (dict(x_scale=(2 / 255, -1.0)), (2 / 255, -1.0))):
        vae = small("full", **options)
        x = levels * a + b
        for one, two in zip(vae.encode(levels), vae.encode(x)):
            torch.testing.assert_close(one, two)
        torch.testing.assert_close(vae(levels, key=KEY).loss, vae(x, key=KEY).loss)
        torch.testing.assert_close(vae.reconstruct(levels), vae.reconstruct(x))
        between = vae.interpolate(levels, levels.flip(0), steps=3)
        torch.testing.assert_close(between, vae.interpolate(x, x.flip(0), steps=3))
        # The loss knows that these are levels, and how far apart.
        bits, density = vae(levels, key=KEY).bits_per_dim, vae(x, key=KEY)
        nats = (density.nll + density.kl) / 64
        torch.testing.assert_close(bits, nats / math.log(2) - math.log2(a))
    half = small("full").to(torch.bfloat16)
    assert half(levels).z.dtype == half.reconstruct(levels).dtype == torch.bfloat16


def test_options_of_the_loss_are_set_on_the_loss():
    vae = small()
    for name, value in dict(beta=2.0, free_bits=0.1, likelihood_clamp=None).items():
        with pytest.raises(AttributeError, match=rf"{name} is an option .* set vae\.elbo\.{name}"):
            setattr(vae, name, value)
    vae.elbo.beta = 2.0
    vae.note = "anything else"

    class Mine(vae_fast.VAE):
        pass

    Mine(torch.nn.Identity(), torch.nn.Identity(), 2).beta = 2.0  # it may mean what it likes


@pytest.mark.parametrize("dequantize", [False, True])
def test_dequantization_is_part_of_the_loss_and_of_its_key(dequantize):
    vae = small("full", dequantize=dequantize)
    x = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    one, two = vae(x, key=KEY), vae(x, key=KEY)
    assert torch.equal(one.nll, two.nll)
    plain = vae_fast.likelihood_nll(x, *vae.decode(one.z), clamp=vae.elbo.likelihood_clamp)
    assert torch.allclose(plain, one.nll, rtol=1e-4) != dequantize


@pytest.mark.parametrize("samples", [1, 2])
def test_what_is_masked_out_is_neither_seen_nor_explained(samples):
    vae = small("full", num_samples=samples)
    x = torch.rand(6, 1, 8, 8)
    mask = torch.rand(6, 1, 8, 8) > 0.4
    holes = torch.where(mask, x, math.nan)
    out = vae(holes, key=KEY, mask=mask)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in vae.parameters())

    mu, scale = vae.encode(torch.where(mask, x, 0.0))
    for one, two in zip(vae.encode(holes, mask), (mu, scale)):
        assert torch.equal(one, two)
    z, log_q, log_p = vae_fast.reparameterize(mu, scale, num_samples=samples, key=KEY)
    mean, raw = vae.decode(z.flatten(0, 1))
    rows = -Normal(mean, torch.exp(raw / 2)).log_prob(x.repeat(samples, 1, 1, 1))
    nll = torch.where(mask.repeat(samples, 1, 1, 1), rows, 0.0).flatten(1).sum(1)
    nll = nll.view(samples, 6)
    torch.testing.assert_close(out.nll.view(samples, 6), nll)
    torch.testing.assert_close(out.loss, (nll + log_q - log_p).mean())
    torch.testing.assert_close(vae.reconstruct(holes, mask), vae.decode(mu)[0].detach())

    # A mask for all rows; and uint8 data, which have no NaN.
    row = mask[:1]
    torch.testing.assert_close(
        vae(x, key=KEY, mask=row).loss, vae(x, key=KEY, mask=row.expand(6, 1, 8, 8)).loss
    )
    levels = (x * 255).to(torch.uint8)
    other = torch.where(mask, levels, 255 - levels)
    assert torch.equal(vae(levels, key=KEY, mask=mask).loss, vae(other, key=KEY, mask=mask).loss)
    with pytest.raises(TypeError, match=r"mask must be a bool torch\.Tensor, got torch\.float32"):
        vae(x, mask=mask.float())
    with pytest.raises(ValueError, match=r"mask of shape \(5, 1, 8, 8\) does not broadcast"):
        vae(x, mask=mask[:5])


def test_weights_of_rows():
    vae = small()
    x, weight = torch.rand(6, 1, 8, 8), torch.rand(6)
    out = vae(x, key=KEY, weight=weight)
    torch.testing.assert_close(out.loss, ((out.nll + out.kl) * weight).mean())


# ---------------------------------------------------------------- the clamp


@pytest.mark.parametrize("param", ["logvar", "logstd", "softplus"])
def test_the_standard_deviation_has_a_floor_by_default(param):
    vae = small(likelihood_param=param)
    with torch.no_grad():
        list(vae.decoder.parameters())[-1].fill_(-100.0)  # the bias of mean and scale
    _, scale = vae.decode(torch.zeros(1, 3))
    std = {
        "logvar": lambda s: torch.exp(s / 2),
        "logstd": torch.exp,
        "softplus": nn.functional.softplus,
    }[param](scale)
    torch.testing.assert_close(std, torch.full_like(std, 0.03), rtol=1e-4, atol=0)

    # The loss has the same floor: the density of a perfect fit is that of σ = 0.03.
    x = vae.decode(vae(torch.zeros(2, 1, 8, 8), key=KEY).z)[0].detach()
    nll = vae_fast.gaussian_nll(
        x, x, scale.expand_as(x).contiguous(), param=param, clamp=vae.elbo.likelihood_clamp
    )
    want = 64 * (math.log(0.03) + 0.5 * math.log(2 * math.pi))
    torch.testing.assert_close(nll, torch.full_like(nll, want), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("param", ["logvar", "logstd", "softplus"])
@pytest.mark.parametrize("likelihood", vae_fast.elbo.LIKELIHOODS)
def test_the_default_bounds_suit_the_likelihood(likelihood, param):
    vae = small(None, likelihood=likelihood, likelihood_param=param)
    if likelihood == "bernoulli":
        assert vae.elbo.likelihood_clamp is None
        return
    bounds = torch.tensor(vae.elbo.likelihood_clamp, dtype=torch.float64)
    _, tau = reference.log_scale_and_scale(bounds, param)
    lo, hi = tau.tolist()
    assert hi == pytest.approx(30.0)
    if likelihood == "logistic":
        # Narrow enough that a level may have all but a hundredth of the mass, and no narrower.
        levels = torch.tensor([[0, 100, 255]], dtype=torch.uint8)
        nll = vae_fast.likelihood_nll(levels, levels / 255, bounds[0].float(), likelihood, param)
        assert 0.005 < float(nll) < 3 * 0.02
        wide = small(None, likelihood=likelihood, likelihood_param=param, x_scale=(1.0, 0.0))
        wide_bounds = torch.tensor(wide.elbo.likelihood_clamp, dtype=torch.float64)
        _, wide_tau = reference.log_scale_and_scale(wide_bounds, param)
        torch.testing.assert_close(wide_tau, 255 * tau)
    else:
        assert lo == pytest.approx(0.03)
    fixed = small(None, likelihood=likelihood, likelihood_scale=-50.0)
    assert fixed.elbo.likelihood_clamp is None


def test_decode_clamps_softly_where_the_loss_does():
    vae = small(likelihood_clamp=(-2.0, 1.0), likelihood_clamp_mode="soft", posterior_clamp=(-1, 1))
    x = torch.rand(4, 1, 8, 8)
    out = vae(x, key=KEY)
    mean, scale = vae.decode(out.z)
    raw = vae.decoder(out.z)[:, 1:]
    torch.testing.assert_close(scale, -0.5 + 1.5 * torch.tanh((raw + 0.5) / 1.5))
    nll = -Normal(mean, torch.exp(scale / 2)).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(out.nll, nll)
    soft = small(posterior_clamp=(-0.5, 0.5), posterior_clamp_mode="soft")
    raw = soft.encoder(x)[:, 3:]
    torch.testing.assert_close(soft.encode(x)[1], 0.5 * torch.tanh(raw / 0.5))


def test_the_clamp_can_be_chosen_or_left_out():
    assert VAE.mlp((4,), 2, likelihood_clamp=(-2.0, 1.0)).elbo.likelihood_clamp == (-2, 1)
    free = small(likelihood_clamp=None)
    with torch.no_grad():
        list(free.decoder.parameters())[-1].fill_(-100.0)
    assert (free.decode(torch.zeros(1, 3))[1] < -90).all()
    with pytest.raises(ValueError, match="likelihood_clamp must be"):
        small(likelihood_clamp="none")


# ---------------------------------------------------------------- conv


@pytest.mark.parametrize("channels", [(4,), (4, 6), (3, 4, 5)])
@pytest.mark.parametrize("event", [(1, 8, 8), (3, 7, 5), (2, 1, 9), (1, 28, 28), (4, 13, 1)])
def test_conv_takes_any_height_and_width(event, channels):
    vae = VAE.conv(event, 4, channels)
    x = torch.rand(2, *event)
    out = vae(x)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in vae.parameters())
    # One packed tensor, mean and scale along dim 1.
    assert vae.decoder(out.z).shape == (2, 2 * event[0], *event[1:])
    mean, scale = vae.decode(out.z)
    assert mean.shape == scale.shape == x.shape
    assert torch.equal(torch.cat([mean, scale.clamp(-7, 7)], 1), vae.decoder(out.z).clamp(-7, 7))


def test_conv_with_one_scale():
    vae = VAE.conv((3, 7, 5), 4, (4, 6), variance="scalar")
    mean, scale = vae.decode(torch.zeros(2, 4))
    assert mean.shape == (2, 3, 7, 5)
    assert scale.shape == ()


def test_conv_decodes_channels_last_and_nobody_else_sees_it():
    vae = VAE.conv((3, 8, 6), 4, (4, 6))
    layouts = []
    for layer in vae.decoder:
        if isinstance(layer, torch.nn.modules.conv._ConvNd):
            layer.register_forward_pre_hook(lambda _, args: layouts.append(args[0].stride()))
    z = torch.randn(2, 4)
    output = vae.decoder(z)
    assert [stride[1] for stride in layouts] == [1, 1, 1]
    assert output.is_contiguous()
    assert all(p.is_contiguous() for p in vae.parameters())

    linear, activation, images, *rest = vae.decoder
    images = activation(linear(z)).reshape(2, 6, 2, 2)
    for layer in rest:
        images = layer(images.contiguous())
    torch.testing.assert_close(output, images)


# ---------------------------------------------------------------- inference


def test_reconstruct_is_the_decoded_posterior_mean_and_draws_nothing():
    vae = small()
    x = torch.rand(4, 1, 8, 8)
    state = torch.get_rng_state()
    first = vae.reconstruct(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.requires_grad
    torch.testing.assert_close(first, vae.decode(vae.encode(x)[0])[0])
    # It is not what a sample of z decodes to.
    assert not torch.allclose(first, vae.decode(vae(x).z)[0])


def test_sample_means_and_draws():
    vae = small("unit")
    mean = vae.sample(400, key=KEY)
    assert mean.shape == (400, 1, 8, 8)
    assert not mean.requires_grad
    assert torch.equal(mean, vae.sample(400, key=KEY))
    assert not torch.equal(mean, vae.sample(400))
    seeded = [vae.sample(4, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*seeded)

    # z has the prior's moments, and the draw adds standard normal noise that z has no part in.
    z = vae_fast.noise.normal(KEY, 400, None, (3,))
    torch.testing.assert_close(vae.decode(z)[0].detach(), mean)
    noise = (vae.sample(400, key=KEY, noise=True) - mean).flatten(1)
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    same_size = VAE.mlp((4,), 4, (8,), variance="unit")
    noise = same_size.sample(400, key=KEY, noise=True) - same_size.sample(400, key=KEY)
    z = vae_fast.noise.normal(KEY, 400, None, (4,))
    assert (noise * z).mean().abs() < 0.1


def test_the_draw_has_the_learned_standard_deviation():
    vae = small("scalar")
    with torch.no_grad():
        vae.decoder.scale.fill_(2 * math.log(0.2))
    noise = vae.sample(300, key=KEY, noise=True) - vae.sample(300, key=KEY)
    assert abs(noise.std() - 0.2) < 0.006


LEVELS = torch.arange(256, dtype=torch.uint8)


def draws_of(likelihood, mean, scale, count, **options):
    """Draws of x, (count,) each, for each element of ``mean``."""
    vae = constant(mean, scale, likelihood=likelihood, likelihood_param="std", **options)
    x = vae.sample(count, key=KEY, noise=True)
    assert torch.equal(x, vae.sample(count, key=KEY, noise=True))
    assert not torch.equal(x, vae.sample(count, noise=True))
    return vae, x


@pytest.mark.parametrize(
    ("likelihood", "df"),
    [("gaussian", 4.0), ("laplace", 4.0), ("student_t", 0.7), ("student_t", 4.0)],
)
def test_draws_have_the_distribution_of_the_likelihood(likelihood, df):
    stats = pytest.importorskip("scipy.stats")
    mean = torch.tensor([0.3, -2.0])
    for scale, options in ((0.7, {}), (None, dict(likelihood_scale=0.7))):
        _, x = draws_of(likelihood, mean, scale, 20_000, df=df, likelihood_clamp=None, **options)
        assert x.isfinite().all()
        want = {
            "gaussian": stats.norm(scale=0.7),
            "laplace": stats.laplace(scale=0.7),
            "student_t": stats.t(df, scale=0.7),
        }[likelihood]
        for i in range(2):
            assert stats.kstest(x[:, i] - mean[i], want.cdf).pvalue > 0.01
        # Elements are independent: four standard deviations of the rank correlation.
        assert abs(stats.spearmanr(x[:, 0], x[:, 1]).statistic) < 4 / math.sqrt(20_000)


def test_draws_of_bernoulli_are_zeros_and_ones():
    logits = torch.tensor([-math.inf, -2.0, 0.5, math.inf])
    vae, x = draws_of("bernoulli", logits, None, 20_000)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(x.mean(0), torch.sigmoid(logits), rtol=0, atol=0.015)
    means = torch.sigmoid(logits).expand(3, 4)
    assert torch.equal(vae.sample(3), means)
    assert torch.equal(vae.reconstruct(torch.zeros(3, 4)), means)
    assert torch.equal(vae.interpolate(*torch.zeros(2, 3, 4), steps=2), means.expand(2, 3, 4))


@pytest.mark.parametrize("tau", [0.2, 3.0, 60.0])
@pytest.mark.parametrize("x_scale", [(1 / 255, 0.0), (2.0, -100.0)])
def test_draws_of_the_logistic_are_levels_with_its_masses(tau, x_scale):
    a, b = x_scale
    mean = a * torch.tensor([-40.0, 0.3, 100.4, 254.9]) + b
    scale = a * tau
    vae, x = draws_of("logistic", mean, scale, 20_000, likelihood_clamp=None, x_scale=x_scale)
    index = (x - b) / a
    torch.testing.assert_close(index, index.round().clamp(0, 255), rtol=0, atol=1e-3)
    each = LEVELS.unsqueeze(1)  # one row per level
    for i, m in enumerate(mean):
        nll = vae_fast.likelihood_nll(
            each, m.expand(256, 1), scale, "logistic", "std", x_scale=x_scale
        )
        mass = torch.exp(-nll)
        torch.testing.assert_close(mass.sum(), torch.tensor(1.0))
        counts = torch.bincount(index[:, i].round().long(), minlength=256) / len(x)
        # The largest distance of the distribution functions, at 1 % significance.
        distance = (counts.cumsum(0) - mass.cumsum(0)).abs().max()
        assert distance < 1.63 / math.sqrt(len(x))
        # The mean is that of the masses, within the rounding to levels.
        level = (mass * torch.arange(256)).sum()
        known = (vae.sample(1)[0, i] - b) / a
        assert float(known) == pytest.approx(float(level), abs=0.5 if tau < 1 else 0.02)


def test_z_is_drawn_from_the_prior_of_the_model():
    n = 4000
    eps = vae_fast.noise.normal(KEY, n, None, (3,))
    mu, std = torch.tensor([1.0, -2.0, 0.0]), torch.tensor(0.5)

    def z_of(prior, **options):
        vae = VAE(nn.Linear(4, 6), lambda z: z, 3, likelihood="bernoulli", prior=prior, **options)
        return torch.logit(vae.sample(n, key=KEY))

    torch.testing.assert_close(z_of(None), eps, rtol=1e-3, atol=1e-3)
    for prior in ((mu, std), (mu[None], std), (nn.Parameter(mu), std[None])):
        torch.testing.assert_close(
            z_of(prior, prior_param="std"), mu + 0.5 * eps, rtol=1e-3, atol=1e-3
        )
    with pytest.raises(ValueError, match=r"prior differs between rows.*\(2, 3\)"):
        z_of((torch.zeros(2, 3), std))

    def density(z):
        return -z.square().sum(1)

    with pytest.raises(ValueError, match=r"prior gives the density.*sample\(n\)"):
        z_of(density)
    density.sample = lambda n: torch.full((n, 3), 2.0)
    torch.testing.assert_close(z_of(density), torch.full((n, 3), 2.0))
    density.sample = lambda n: torch.zeros(n, 2)
    with pytest.raises(ValueError, match=r"prior\.sample\(4000\) must return.*got \(4000, 2\)"):
        z_of(density)


def test_interpolate_walks_the_latent_line_from_one_reconstruction_to_the_other():
    vae = small()
    x0, x1 = torch.rand(2, 3, 1, 8, 8)
    path = vae.interpolate(x0, x1, steps=5)
    assert path.shape == (5, 3, 1, 8, 8)
    torch.testing.assert_close(path[0], vae.reconstruct(x0))
    torch.testing.assert_close(path[-1], vae.reconstruct(x1))
    mu0, mu1 = vae.encode(x0)[0].detach(), vae.encode(x1)[0].detach()
    torch.testing.assert_close(path[1], vae.decode(0.75 * mu0 + 0.25 * mu1)[0].detach())
    with pytest.raises(ValueError, match="steps"):
        vae.interpolate(x0, x1, steps=1)
    with pytest.raises(ValueError, match=r"x0 and x1.*\(3, 1, 8, 8\) and \(2, 1, 8, 8\)"):
        vae.interpolate(x0, x1[:2])


# ---------------------------------------------------------------- log p(x)


class LinearGaussian(nn.Module):
    """A decoder x = Wz + b, with counts of the rows of z that it was given."""

    def __init__(self, size, latent):
        super().__init__()
        self.linear = nn.Linear(latent, size).double()
        self.rows = []

    def forward(self, z):
        self.rows.append(len(z))
        return self.linear(z)


def linear_gaussian(sigma=0.4, **options):
    """Probabilistic PCA with its posterior as the encoder, a bit off; and its log p(x)."""
    decoder = LinearGaussian(5, 2)
    weight, bias = decoder.linear.weight.detach(), decoder.linear.bias.detach()
    mu, std = options.get("prior", (torch.zeros(2), torch.ones(2)))
    prior_precision = torch.diag(std.double() ** -2)
    precision = prior_precision + weight.T @ weight / sigma**2
    covariance = torch.linalg.inv(precision)

    def encoder(x):
        given = (x - bias) @ weight / sigma**2 + prior_precision @ mu.double()
        mean = given @ covariance
        std = covariance.diagonal().sqrt()
        return mean + 0.2 * std, (1.2 * std).log().mul(2).expand_as(mean)

    vae = VAE(
        encoder, decoder, 2, likelihood_scale=sigma, likelihood_param="std", prior_param="std",
        **options,
    )  # fmt: skip
    marginal = MultivariateNormal(
        bias + weight @ mu.double(),
        weight @ torch.diag(std.double() ** 2) @ weight.T
        + sigma**2 * torch.eye(5, dtype=torch.float64),
    )
    return vae, marginal


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(beta=4.0, objective="iwae", num_samples=3),
        dict(kl="analytic", free_bits=1.0),
        dict(prior=(torch.tensor([0.5, -1.0]).double(), torch.tensor([0.7, 2.0]).double())),
    ],
)
def test_log_likelihood_of_a_linear_gaussian_model(options):
    vae, marginal = linear_gaussian(**options)
    x = marginal.sample((7,))
    exact = marginal.log_prob(x)
    estimate = vae.log_likelihood(x, 20_000, 5_000, key=KEY)
    assert estimate.shape == (7,)
    assert estimate.dtype == torch.float64
    assert not estimate.requires_grad
    torch.testing.assert_close(estimate, exact, rtol=0, atol=0.02)
    # One sample is the ELBO, on average well below.
    one = torch.stack([vae.log_likelihood(x, 1) for _ in range(50)]).mean()
    assert one < exact.mean() - 0.05


def test_log_likelihood_decodes_exactly_the_samples_asked_for_a_chunk_at_a_time():
    vae, marginal = linear_gaussian()
    encoded, encoder = [], vae.encoder
    vae.encoder = lambda x: (encoded.append(len(x)), encoder(x))[1]
    x = marginal.sample((3,))
    for samples, chunk, rows in (
        (10, 4, [12, 12, 6]),
        (10, 5, [15, 15]),
        (10, 100, [30]),
        (1, 100, [3]),
        (3, 1, [3, 3, 3]),
    ):
        vae.decoder.rows.clear()
        encoded.clear()
        estimate = vae.log_likelihood(x, samples, chunk, key=KEY)
        assert vae.decoder.rows == rows
        assert encoded == [3]
        assert torch.equal(estimate, vae.log_likelihood(x, samples, chunk, key=KEY))
    # One sample: log p(x|z) + log p(z) − log q(z|x) of the z that the key gives.
    mu, scale = vae.encode(x)
    z, log_q, log_p = vae_fast.reparameterize(mu, scale, num_samples=1, key=KEY)
    log_x = Normal(vae.decoder(z[0]), 0.4).log_prob(x).sum(1)
    torch.testing.assert_close(vae.log_likelihood(x, 1, key=KEY), (log_x + log_p - log_q)[0])


@pytest.mark.parametrize("levels", [False, True])
def test_log_likelihood_of_a_split_batch_is_that_of_the_whole(levels):
    options = dict(x_scale=(0.5, -64.0), dequantize=True) if levels else {}
    vae, marginal = linear_gaussian(**options)
    x, mask = marginal.sample((5,)), torch.rand(5, 5) < 0.8
    if levels:
        x = ((x + 64) / 0.5).floor().to(torch.uint8)
    whole = vae.log_likelihood(x, 7, 3, key=KEY, mask=mask)
    parts = [
        vae.log_likelihood(x[a:b], 7, 3, key=KEY, mask=mask[a:b], first_row=a)
        for a, b in ((0, 2), (2, 5))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=0)
    # Nor do scales get into other rows, in one tensor with the means or in one of their own.
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    networks = small("full")
    packed = networks.decoder
    for decoder in (packed, lambda z: tuple(t.clone() for t in packed(z).chunk(2, 1))):
        learned = VAE(networks.encoder, decoder, 3, dequantize=levels)
        whole = learned.log_likelihood(images, 7, 3, key=KEY)
        for row in range(5):
            part = learned.log_likelihood(images[row : row + 1], 7, 3, key=KEY, first_row=row)
            torch.testing.assert_close(part, whole[row : row + 1], rtol=1e-5, atol=0)
    # Equal rows have noise of their own.
    same = vae.log_likelihood(x[:1].expand(4, -1), 7, 3, key=KEY)
    assert len(same.unique()) == 4


def test_log_likelihood_is_the_sum_over_chunks_of_their_weights():
    """Chunks are samples of one estimate: they are averaged as weights, and share no noise."""
    vae, marginal = linear_gaussian()
    x = marginal.sample((3,))
    drawn = []
    vae.decoder.register_forward_pre_hook(lambda module, z: drawn.append(z[0]))
    whole = vae.log_likelihood(x, 7, 3, key=KEY)
    z = torch.cat([part.view(-1, 3, 2) for part in drawn])
    assert len(z) == 7
    assert len(z.flatten().unique()) == 7 * 3 * 2
    mu, scale = vae.encode(x)
    log_q = Normal(mu, torch.exp(scale / 2)).log_prob(z).sum(2)
    log_p = Normal(0.0, 1.0).log_prob(z).sum(2)
    log_x = Normal(vae.decoder(z), 0.4).log_prob(x).sum(2)
    torch.testing.assert_close(whole, torch.logsumexp(log_x + log_p - log_q, 0) - math.log(7))


def test_log_likelihood_of_what_is_there_and_of_levels():
    vae, marginal = linear_gaussian()
    x = marginal.sample((4,))
    mask = torch.tensor([True, False, True, True, False])
    encoder = vae.encoder
    there = MultivariateNormal(marginal.mean[mask], marginal.covariance_matrix[mask][:, mask])
    # The encoder is made for whole data; from the prior the estimate is as good as any.
    vae.encoder = lambda x: (torch.zeros(len(x), 2).double(), torch.full((len(x), 2), 0.5).double())
    exact = there.log_prob(x[:, mask])
    holes = torch.where(mask, x, math.nan)
    estimate = vae.log_likelihood(holes, 40_000, 10_000, key=KEY, mask=mask)
    torch.testing.assert_close(estimate, exact, rtol=0, atol=0.1)
    vae.encoder = encoder

    # A level's mass, from the density's mean over the level.
    coarse, marginal = linear_gaussian(x_scale=(0.5, -64.0), dequantize=True)
    levels = ((marginal.sample((3,)) + 64) / 0.5).floor().to(torch.uint8)
    estimate = coarse.log_likelihood(levels, 40_000, 10_000, key=KEY)
    fine = levels + torch.rand(20_000, 3, 5, dtype=torch.float64)
    exact = marginal.log_prob(fine * 0.5 - 64.0).exp().mean(0).log()
    torch.testing.assert_close(estimate, exact, rtol=0, atol=0.05)
    # What is masked out does not matter there either, and a mask may be for all rows.
    other = torch.where(mask, levels, 255 - levels)
    one, two = (coarse.log_likelihood(t, 10, 4, key=KEY, mask=mask) for t in (levels, other))
    assert torch.equal(one, two)
    assert (one != coarse.log_likelihood(levels, 10, 4, key=KEY)).all()


@pytest.mark.parametrize("likelihood", vae_fast.elbo.LIKELIHOODS)
def test_log_likelihood_is_above_the_elbo_for_every_likelihood(likelihood):
    vae = small(None, likelihood=likelihood, reduction="none")
    with torch.no_grad():
        list(vae.encoder.parameters())[-1].add_(0.5)  # a posterior that is not the prior
    x = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    elbo = -torch.stack([vae(x).loss.detach() for _ in range(100)]).mean(0)
    estimate = vae.log_likelihood(x, 500)
    assert estimate.dtype == torch.float32
    assert (estimate > elbo).all()
    assert (estimate - elbo < 30).all()


def test_log_likelihood_refuses_what_has_none():
    x = torch.rand(2, 1, 8, 8)
    with pytest.raises(ValueError, match="no density of x"):
        small(None, likelihood_scale="optimal_channel").log_likelihood(x)
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        small().log_likelihood(x, 0)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        small().log_likelihood(x, 5, 0)


# ---------------------------------------------------------------- files


MODELS = {
    "mlp": lambda: small("full", num_samples=2, beta=0.5, posterior_clamp=(-9.0, 9.0)),
    "mlp-scalar": lambda: small("scalar", likelihood_param="softplus"),
    "mlp-unit": lambda: small("unit"),
    "mlp-double": lambda: small().double(),
    "mlp-channel": lambda: small("channel", likelihood="laplace", likelihood_clamp_mode="soft"),
    "mlp-fixed": lambda: small(None, likelihood="student_t", likelihood_scale=-1.0, df=2.5),
    "bernoulli": lambda: small(None, likelihood="bernoulli", objective="iwae", estimator="dreg"),
    "logistic": lambda: small(None, likelihood="logistic", x_scale=(1 / 16, 0.0)),
    "tensors": lambda: small(
        beta=torch.tensor(0.25), kl="analytic", capacity=torch.tensor(1.5), posterior_clamp=(-9, 9)
    ),
    "free-bits": lambda: small(kl="analytic", free_bits=0.25, num_samples=3, reduction="sum"),
    "gaussian-prior": lambda: small(
        prior=(nn.Parameter(torch.tensor([1.0, 2.0, 3.0])), torch.tensor(0.5)), prior_param="std"
    ),
    "conv": lambda: VAE.conv((1, 8, 8), 3, (4, 5), likelihood_clamp=None),
}


@pytest.mark.parametrize("name", MODELS)
def test_save_and_load_give_bitwise_the_same_model(name, tmp_path):
    vae = MODELS[name]()
    with torch.no_grad():  # away from the initial values
        for parameter in vae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    path = tmp_path / "deep" / "model.safetensors"
    vae.save(path)
    loaded = VAE.load(path)

    x = torch.rand(4, 1, 8, 8).to(next(vae.parameters()).dtype)
    one, two = vae(x, key=KEY), loaded(x, key=KEY)
    for field in ("loss", "nll", "log_q", "log_p", "z"):
        assert torch.equal(getattr(one, field), getattr(two, field)), field
    assert torch.equal(vae.sample(4, key=KEY, noise=True), loaded.sample(4, key=KEY, noise=True))
    assert loaded.elbo.options() == vae.elbo.options()
    assert loaded.elbo.prior == vae.elbo.prior
    assert [p.requires_grad for p in loaded.parameters()] == [True] * len([*vae.parameters()])
    assert [n for n, _ in loaded.named_buffers()] == [n for n, _ in vae.named_buffers()]
    assert os.listdir(path.parent) == [path.name]

    # What is loaded can be saved again, and trained.
    loaded.save(path)
    VAE.load(path)(x).loss.backward()


def test_the_file_is_safetensors_with_json_in_its_header(tmp_path):
    path = tmp_path / "model.safetensors"
    small().save(path)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    config = json.loads(header["__metadata__"]["vae_fast"])
    assert config["architecture"]["kind"] == "mlp"
    assert set(header) - {"__metadata__"} == set(small().state_dict())
    # Nothing but the numbers follows.
    assert len(content) == 8 + length + 4 * sum(p.numel() for p in small().parameters())


def test_a_file_of_the_first_format_still_loads(tmp_path):
    """As version 1 wrote it: nine options, no prior."""
    import safetensors.torch

    vae = small("scalar", beta=0.5)
    old = (
        "beta", "num_samples", "posterior_param", "likelihood_param", "kl", "reduction",
        "posterior_clamp", "likelihood_clamp", "inplace",
    )  # fmt: skip
    config = {
        "format": 1,
        "architecture": {
            "kind": "mlp", "event_shape": [1, 8, 8], "latent_dim": 3, "hidden": [16],
            "variance": "scalar",
        },
        "latent_shape": [3],
        "options": {name: vae.elbo.options()[name] for name in old},
    }  # fmt: skip
    path = tmp_path / "old.safetensors"
    metadata = {"format": "pt", "vae_fast": json.dumps(config)}
    safetensors.torch.save_file(vae.state_dict(), path, metadata)
    loaded = VAE.load(path)
    assert loaded.elbo.options() == vae.elbo.options()
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(loaded(x, key=KEY).loss, vae(x, key=KEY).loss)
    config["format"] = 99
    metadata["vae_fast"] = json.dumps(config)
    safetensors.torch.save_file(vae.state_dict(), path, metadata)
    with pytest.raises(ValueError, match="has format 99, this version reads formats up to"):
        VAE.load(path)


class Mixture(nn.Module):
    """A prior of one's own: two Gaussians side by side."""

    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.tensor(1.0))

    def forward(self, z):
        sides = torch.stack([Normal(s * self.at, 1.0).log_prob(z).sum(1) for s in (-1, 1)])
        return torch.logsumexp(sides, 0) - math.log(2)


def test_a_callable_prior_is_passed_to_load(tmp_path):
    vae = small(prior=Mixture())
    with torch.no_grad():
        vae.elbo.prior.at.fill_(2.0)
    path = tmp_path / "model.safetensors"
    vae.save(path)
    with pytest.raises(ValueError, match=r"VAE\.load\(path, prior=\.\.\.\)"):
        VAE.load(path)
    prior = Mixture()
    loaded = VAE.load(path, prior=prior)
    assert loaded.elbo.prior is prior
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(loaded(x, key=KEY).log_p, vae(x, key=KEY).log_p)
    small().save(path)
    with pytest.raises(ValueError, match=r"needs no prior: its own is N\(0, 1\)"):
        VAE.load(path, prior=prior)


def test_a_gaussian_prior_of_a_model_of_ones_own(tmp_path):
    vae = VAE(nn.Linear(6, 4), nn.Linear(2, 12), 2, prior=(torch.ones(2), torch.zeros(1, 1)))
    vae.save(tmp_path / "own.safetensors")
    loaded = VAE.load(
        tmp_path / "own.safetensors", encoder=nn.Linear(6, 4), decoder=nn.Linear(2, 12)
    )
    assert [n for n, _ in loaded.named_buffers()] == ["elbo.prior_mu", "elbo.prior_scale"]
    x = torch.rand(3, 6)
    assert torch.equal(loaded(x, key=KEY).loss, vae(x, key=KEY).loss)


def test_a_model_of_ones_own_needs_its_networks_back(tmp_path):
    def networks():
        return nn.Linear(6, 4), TwoHeads(nn.Linear(2, 6), nn.Linear(2, 6))

    vae = VAE(*networks(), 2, beta=2.0)
    path = tmp_path / "own.safetensors"
    vae.save(path)
    with pytest.raises(ValueError, match=r"VAE\.load\(path, encoder=\.\.\., decoder=\.\.\.\)"):
        VAE.load(path)
    with pytest.raises(ValueError, match="pass both"):
        VAE.load(path, encoder=networks()[0])
    encoder, decoder = networks()
    loaded = VAE.load(path, encoder=encoder, decoder=decoder)
    assert loaded.encoder is encoder
    x = torch.rand(5, 6)
    assert torch.equal(loaded(x, key=KEY).loss, vae(x, key=KEY).loss)


def test_a_prior_that_is_set_anew(tmp_path):
    """It is the model's as if it had been there from the start, and the old one is gone."""
    x, path = torch.rand(4, 4), tmp_path / "model.safetensors"
    vae = VAE.mlp(4, 2, (4,))
    prior = nn.Parameter(torch.ones(2)), torch.zeros(2)
    vae.elbo.prior = prior
    assert vae.elbo.prior_mu is prior[0]
    assert prior[0] in set(vae.parameters())
    same = VAE.mlp(4, 2, (4,), prior=prior)
    same.load_state_dict(vae.state_dict())
    assert torch.equal(same(x, key=KEY).loss, vae(x, key=KEY).loss)
    assert torch.equal(same.sample(3, key=KEY), vae.sample(3, key=KEY))
    vae.save(path)
    assert torch.equal(VAE.load(path)(x, key=KEY).loss, vae(x, key=KEY).loss)

    vae.elbo.prior = nn.Linear(2, 1)
    assert {"elbo.prior.weight", "elbo.prior.bias"} < set(vae.state_dict())
    assert not hasattr(vae.elbo, "prior_mu")
    vae.elbo.prior = None
    assert not any("prior" in name for name in vae.state_dict())
    vae.save(path)
    assert torch.equal(VAE.load(path)(x, key=KEY).loss, vae(x, key=KEY).loss)


@pytest.mark.parametrize("wrong", [3, (torch.zeros(2), 1.0), nn.Linear(2, 1)])
def test_a_wrong_prior_leaves_the_old_one(wrong):
    prior = nn.Parameter(torch.ones(2)), torch.zeros(2)
    elbo = FusedELBO(prior=prior, kl="analytic")
    with pytest.raises((TypeError, ValueError), match="prior"):
        elbo.prior = wrong
    assert list(elbo.named_parameters()) == [("prior_mu", prior[0])]
    assert elbo.prior_scale is prior[1]
    assert elbo.prior == "gaussian"


def test_options_of_other_kinds_of_numbers_can_be_saved(tmp_path):
    options = dict(x_scale=np.float32([0.5, -1]), posterior_clamp=(torch.tensor(-1.0), 4))
    vae = VAE.mlp(4, 2, (4,), likelihood_clamp=(np.float32(-2), 2), **options)
    vae.save(tmp_path / "model.safetensors")
    assert VAE.load(tmp_path / "model.safetensors").elbo.options() == vae.elbo.options()


def test_binary_data_of_python_s_kind():
    vae = VAE.mlp(4, 2, (4,), likelihood="bernoulli")
    x = torch.rand(3, 4) > 0.5
    with pytest.raises(TypeError, match=r"x must be .* got bool: x\.float\(\) has its values"):
        vae(x)
    binary = VAE.mlp(4, 2, (4,), likelihood="bernoulli", x_scale=(1, 0))
    binary.load_state_dict(vae.state_dict())
    assert torch.equal(binary(x.byte(), key=KEY).loss, vae(x.float(), key=KEY).loss)


def test_weights_that_share_memory_can_be_saved(tmp_path):
    shared = nn.Linear(4, 4)
    vae = VAE(shared, shared, 2)  # 4 in, mean and scale of 2; and the other way a stand-in
    vae.save(tmp_path / "tied.safetensors")
    loaded = VAE.load(
        tmp_path / "tied.safetensors", encoder=nn.Linear(4, 4), decoder=nn.Linear(4, 4)
    )
    assert torch.equal(loaded.decoder.weight, shared.weight)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    small().save(path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        small("unit").save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_load_refuses_what_save_did_not_write(tmp_path):
    import safetensors.torch

    with pytest.raises(FileNotFoundError):
        VAE.load(tmp_path / "absent.safetensors")
    text = tmp_path / "text.safetensors"
    text.write_text("this is not a model at all")
    with pytest.raises(ValueError, match="not a safetensors file"):
        VAE.load(text)
    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2)}, foreign)
    with pytest.raises(ValueError, match=r"not written by VAE\.save"):
        VAE.load(foreign)


def test_load_of_a_subclass_that_is_made_otherwise(tmp_path):
    class Other(VAE):
        def __init__(self, size):
            super().__init__(torch.nn.Linear(size, 4), torch.nn.Linear(2, 2 * size), 2)

    made = Other(6)
    made.save(tmp_path / "m.safetensors")
    with pytest.raises(
        ValueError, match=r"Other cannot be made with \(encoder, decoder, .*VAE.load"
    ):
        Other.load(tmp_path / "m.safetensors", encoder=made.encoder, decoder=made.decoder)
    networks = {"encoder": made.encoder, "decoder": made.decoder}
    loaded = VAE.load(tmp_path / "m.safetensors", **networks)
    assert torch.equal(loaded.encoder.weight, made.encoder.weight)


@pytest.mark.parametrize("shape", [(64,), (8, 8), (8, 8, 1), (64, 1, 1)])
def test_data_of_another_shape_are_refused_before_they_are_encoded(shape):
    """As many elements make no image."""
    vae, x = VAE.mlp((1, 8, 8), 2), torch.rand(3, *shape)
    for method in (vae, vae.encode, vae.reconstruct):
        with pytest.raises(ValueError, match=r"x must be of shape \(B, 1, 8, 8\), got \(3, "):
            method(x)
    assert vae.reconstruct(x.view(3, 1, 8, 8)).shape == (3, 1, 8, 8)


def test_wrong_data_are_named_before_what_the_encoder_makes_of_them():
    vae, x, mask = VAE.mlp(6, 2), torch.rand(4, 6), torch.ones(4, 6, dtype=torch.bool)
    x[1, 2] = torch.nan
    with vae_fast.validate():
        for method in (vae, vae.encode):
            with pytest.raises(ValueError, match="x must be finite, but 1 elements are not"):
                method(x)
        mask[1, 2] = False
        assert vae(x, mask=mask).loss.isfinite()
        with pytest.raises(TypeError, match="mask must be a bool"):
            vae(x, mask="all")
        with pytest.raises(ValueError, match="mask of shape"):
            vae(x, mask=mask[:, :3])


def header(path, change):
    """The model of ``path`` with a changed configuration, beside it."""
    import safetensors.torch

    with safetensors.safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["vae_fast"])
    changed = path.with_name("changed.safetensors")
    text = json.dumps(change(config))
    weights = safetensors.torch.load_file(path)
    safetensors.torch.save_file(weights, changed, metadata={"vae_fast": text})
    return changed


@pytest.mark.parametrize(
    "change",
    [
        lambda config: [],
        lambda config: config | {"options": None},
        lambda config: {"format": config["format"]},
        lambda config: config | {"architecture": {"kind": "rnn"}},
        lambda config: config | {"architecture": config["architecture"] | {"hidden": [9]}},
        lambda config: config | {"architecture": config["architecture"] | {"depth": 9}},
    ],
)
def test_load_explains_damage(change, tmp_path):
    path = tmp_path / "m.safetensors"
    VAE.mlp((4,), 2, (8,)).save(path)
    with pytest.raises(ValueError, match=r"changed.safetensors is damaged, or its weights are not"):
        VAE.load(header(path, change))


def test_a_compiled_network_is_saved_as_the_network(tmp_path):
    vae = VAE.mlp((4,), 2, (8,))
    x, key = torch.rand(3, 4), torch.zeros(2, dtype=torch.uint64)
    expected = vae(x, key=key).loss
    vae.encoder = torch.compile(vae.encoder)
    vae.save(tmp_path / "m.safetensors")
    assert torch.equal(VAE.load(tmp_path / "m.safetensors")(x, key=key).loss, expected)


@pytest.mark.parametrize("nested", [False, True])
def test_a_network_that_was_replaced_must_be_given_to_load(nested, tmp_path):
    path = tmp_path / "m.safetensors"
    vae = VAE.mlp((4,), 2, (8,))

    def replace(vae):
        if nested:
            vae.encoder[-1] = torch.nn.Sequential(torch.nn.Linear(8, 9), torch.nn.Linear(9, 4))
        else:
            vae.encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 4))

    replace(vae)
    vae.save(path)
    with pytest.raises(ValueError, match="pass both"):
        VAE.load(path)
    other = VAE.mlp((4,), 2, (8,))
    replace(other)
    loaded = VAE.load(path, encoder=other.encoder, decoder=other.decoder)
    x, key = torch.rand(3, 4), torch.zeros(2, dtype=torch.uint64)
    assert torch.equal(loaded(x, key=key).loss, vae(x, key=key).loss)
    plain = VAE.mlp((4,), 2, (8,))
    with pytest.raises(ValueError, match="its weights are not those of these networks"):
        VAE.load(path, encoder=plain.encoder, decoder=plain.decoder)


@pytest.mark.parametrize("change", ["appended", "replaced", "another setting"])
def test_layers_without_weights_must_be_given_to_load_as_well(change, tmp_path):
    path = tmp_path / "m.safetensors"

    def made():
        vae = (
            VAE.mlp((4,), 2, (8,)) if change != "another setting" else VAE.conv((1, 8, 8), 2, (4,))
        )
        if change == "appended":
            vae.decoder.append(torch.nn.Dropout(0.1))
        elif change == "replaced":
            vae.encoder[2] = torch.nn.ReLU()
        else:
            conv = next(m for m in vae.encoder.modules() if isinstance(m, torch.nn.Conv2d))
            conv.padding_mode = "circular"
        return vae

    made().save(path)
    with pytest.raises(ValueError, match="pass both"):
        VAE.load(path)
    other = made()
    VAE.load(path, encoder=other.encoder, decoder=other.decoder)


def test_options_that_go_with_other_networks_do_not_keep_a_model_from_being_saved(tmp_path):
    path = tmp_path / "m.safetensors"
    vae = VAE.mlp((4,), 2, (8,))
    vae.elbo.posterior_param = "std"  # which these networks could not be made with
    vae.save(path)
    with pytest.raises(ValueError, match="pass both"):
        VAE.load(path)
    other = VAE.mlp((4,), 2, (8,))
    loaded = VAE.load(path, encoder=other.encoder, decoder=other.decoder)
    assert loaded.elbo.posterior_param == "std"


def test_files_need_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (VAE.mlp((4,), 2).save, VAE.load):
        with pytest.raises(ModuleNotFoundError, match=r"pip install .vae_fast\[train\]."):
            call(tmp_path / "m.safetensors")


def test_sizes_may_be_numpys():
    assert VAE.mlp(np.int64(4), np.int32(2), (np.int64(8),)).latent_shape == (2,)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: VAE.mlp((4,), 0), ValueError, "latent_dim must be a positive integer, got 0"),
        (lambda: VAE.mlp((), 2), ValueError, "event_shape must have at least one dimension"),
        (lambda: VAE.mlp((4,), 2, (0,)), ValueError, "hidden must be a positive integer"),
        (lambda: VAE.mlp((4,), 2, variance="one"), ValueError, "variance must be one of full"),
        (lambda: VAE.mlp((4,), 2, likelihood_param="std"), ValueError, "likelihood_param must be"),
        (lambda: VAE.mlp((4,), 2, posterior_param="var"), ValueError, "posterior_param must be"),
        (lambda: VAE.mlp((4,), 2, colour="red"), TypeError, "unknown option 'colour'"),
        (lambda: VAE(None, None, 2, colour="red"), TypeError, "unknown option 'colour'"),
        (lambda: VAE.mlp((4,), 2, likelihood="poisson"), ValueError, "likelihood must be one of"),
        (lambda: VAE.mlp((4,), 2, likelihood_scale="best"), ValueError, "likelihood_scale must be"),
        (lambda: VAE.conv((8, 8), 2), ValueError, r"must be \(C, H, W\), got \(8, 8\)"),
        (lambda: VAE.conv((1, 8, 8), 2, ()), ValueError, "channels"),
        (lambda: VAE.mlp((4,), 2, num_samples=0), ValueError, "num_samples"),
        (lambda: VAE.mlp((4,), 2, reduction="median"), ValueError, "reduction"),
    ],
)
def test_wrong_options_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_wrong_networks_are_named():
    x = torch.rand(3, 4)
    good = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"encoder's mean must be of shape \(B, 3\).*\(3, 2\)"):
        VAE(good, good, 3)(x)
    with pytest.raises(TypeError, match=r"the encoder must return .* got dict"):
        VAE(lambda x: {"mu": x}, good, 2)(x)
    with pytest.raises(ValueError, match=r"the encoder returned one tensor.*\(3, 5\)"):
        VAE(nn.Linear(4, 5), good, 2)(x)
    with pytest.raises(ValueError, match=r"z must be of shape \(N, 2\), got \(3, 4\)"):
        VAE(good, good, 2).decode(x)
    with pytest.raises(ValueError, match="n must be at least 0"):
        VAE(good, good, 2).sample(-1)


def test_deep_copies_are_independent():
    vae = small()
    twin = copy.deepcopy(vae)
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(vae(x, key=KEY).loss, twin(x, key=KEY).loss)
    with torch.no_grad():
        next(iter(twin.parameters())).add_(1.0)
    assert not torch.equal(vae(x, key=KEY).loss, twin(x, key=KEY).loss)


# ---------------------------------------------------------------- training


def test_a_learned_variance_beats_unit_variance_on_the_digits():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32)
    x = x[torch.randperm(len(x))]
    train, val = x[:1437], x[1437:]
    nll = {}
    for variance in ("full", "unit"):
        torch.manual_seed(0)
        vae = VAE.mlp((8, 8), 8, hidden=(128,), variance=variance)
        optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
        for _ in range(12):
            for index in torch.randperm(len(train)).split(128):
                optimizer.zero_grad()
                vae(train[index]).loss.backward()
                optimizer.step()
        with torch.no_grad():
            nll[variance] = float(vae(val, key=KEY).nll.mean())
    # 64 pixels at σ = 1 cost 32·log 2π = 58.8 nats at best.
    assert nll["unit"] > 58.8
    assert nll["full"] < nll["unit"] - 60, nll


def test_equal_models_are_equal_files(tmp_path):
    vae = vae_fast.VAE.mlp(9, 3, hidden=(8,))
    files = [tmp_path / f"{n}.safetensors" for n in range(12)]
    for file in files:
        vae.save(file)
    assert len({file.read_bytes() for file in files}) == 1


@pytest.mark.parametrize("variance", ["channel", "scalar", "unit"])
def test_a_shared_scale_begins_anew_after_the_meta_device(variance):
    with torch.device("meta"):
        vae = vae_fast.VAE.mlp((3, 4), 2, variance=variance)
    vae.to_empty(device="cpu")
    with torch.no_grad():
        vae.decoder.scale.fill_(torch.nan)
    vae.decoder.reset_parameters()
    assert torch.equal(
        vae.decoder.scale, vae_fast.VAE.mlp((3, 4), 2, variance=variance).decoder.scale
    )
