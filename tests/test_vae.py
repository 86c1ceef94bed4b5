"""The ``VAE`` module: its loss, its methods, its files."""

import copy
import json
import math
import os
import struct

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

import vae_fast
from vae_fast import VAE

EVENTS = [(5,), (1, 8, 8), (3, 4, 2, 2)]
KEY = torch.tensor([7, 3], dtype=torch.uint64)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small(variance="full", event=(1, 8, 8), latent=3, **options):
    return VAE.mlp(event, latent, hidden=(16,), variance=variance, **options)


def std_of(scale, like):
    return torch.exp(0.5 * scale).expand_as(like)


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
        x, x, scale.expand_as(x).contiguous(), param=param, clamp=vae._options["likelihood_clamp"]
    )
    want = 64 * (math.log(0.03) + 0.5 * math.log(2 * math.pi))
    torch.testing.assert_close(nll, torch.full_like(nll, want), rtol=1e-4, atol=1e-3)


def test_the_clamp_can_be_chosen_or_left_out():
    assert VAE.mlp((4,), 2, likelihood_clamp=(-2.0, 1.0))._options["likelihood_clamp"] == (-2, 1)
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


# ---------------------------------------------------------------- files


MODELS = {
    "mlp": lambda: small("full", num_samples=2, beta=0.5, posterior_clamp=(-9.0, 9.0)),
    "mlp-scalar": lambda: small("scalar", likelihood_param="softplus"),
    "mlp-unit": lambda: small("unit"),
    "mlp-double": lambda: small().double(),
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
    assert loaded._options == vae._options
    assert [p.requires_grad for p in loaded.parameters()] == [True] * len([*vae.parameters()])
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
