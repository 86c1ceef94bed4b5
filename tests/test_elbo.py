"""FusedELBO end to end: loss, gradients through encoder and decoder, in place, saved memory."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal

import vae_fast
from vae_fast import buffers, reference


def networks(data, latent, device, dtype=torch.float32):
    torch.manual_seed(5)
    encoder = nn.Linear(data, 2 * latent)
    decoder = nn.Sequential(nn.Linear(latent, 8), nn.Tanh(), nn.Linear(8, 2 * data))
    return encoder.to(device, dtype), decoder.to(device, dtype)


def step(elbo, encoder, decoder, x, key, packed, scalar=None, cotangent=1.0):
    """One step: the output, and every parameter's gradient."""
    encoder.zero_grad()
    decoder.zero_grad()
    mu, logvar = encoder(x).chunk(2, 1)

    def decode(z):
        h = decoder(z)
        if scalar is not None:
            return h.chunk(2, 1)[0], scalar
        return h if packed else h.chunk(2, 1)

    out = elbo(x, mu, logvar, decode, key=key)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    if scalar is not None:
        parameters.append(scalar)
    loss = (out.loss * cotangent).sum()
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return out, [g for g in grads if g is not None]


def assert_close(a, b, name=""):
    """Equal up to the rounding of sums: relative to the largest element."""
    assert (a.shape, a.dtype) == (b.shape, b.dtype), name
    bound = (1e-12 if b.dtype == torch.float64 else 2e-6) * b.abs().max().item()
    error = (a - b).abs().max().item()
    assert error <= bound, f"{name}: error {error:.3g} > {bound:.3g}"


def assert_same_step(ours, theirs):
    for name, a, b in zip(ours[0]._fields[:5], ours[0], theirs[0]):
        assert_close(a, b, name)
    for i, (a, b) in enumerate(zip(ours[1], theirs[1], strict=True)):
        assert_close(a, b, f"gradient of parameter {i}")


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_agrees_with_the_reference(num_samples, reduction, packed, inplace, dtype, fused, key):
    encoder, decoder = networks(19, 5, fused, dtype)
    x, key = torch.randn(6, 19, device=fused, dtype=dtype), key.to(fused)
    elbo = vae_fast.FusedELBO(0.7, num_samples, reduction=reduction, inplace=inplace)
    # A cotangent other than one is what a loss scale is; per-row ones are a weighted loss.
    for cotangent in (1.0, 256.0, torch.rand_like(x[:, 0]) if reduction == "none" else 0.3):
        ours = step(elbo, encoder, decoder, x, key, packed, cotangent=cotangent)
        with vae_fast.use_backend("reference"):
            theirs = step(elbo, encoder, decoder, x, key, packed, cotangent=cotangent)
        assert_same_step(ours, theirs)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("param", ["logvar", "std"])
def test_learned_scalar_scale(inplace, param, fused, key):
    encoder, decoder = networks(19, 5, fused)
    x, key = torch.randn(6, 19, device=fused), key.to(fused)
    scalar = torch.tensor(0.8, device=fused, requires_grad=True)
    elbo = vae_fast.FusedELBO(num_samples=2, likelihood_param=param, inplace=inplace)
    ours = step(elbo, encoder, decoder, x, key, False, scalar, 3.0)
    with vae_fast.use_backend("reference"):
        theirs = step(elbo, encoder, decoder, x, key, False, scalar, 3.0)
    assert len(ours[1]) == len(theirs[1])
    assert_same_step(ours, theirs)


def test_is_the_negative_elbo(backend, key):
    """Against torch.distributions, written out."""
    encoder, decoder = networks(7, 2, backend)
    x = torch.randn(4, 7, device=backend)
    mu, logvar = encoder(x).chunk(2, 1)
    out = vae_fast.FusedELBO(beta=2.0)(x, mu, logvar, decoder, key=key.to(backend))
    q, p = Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0)
    mean, s = decoder(out.z).chunk(2, 1)
    nll = -Normal(mean, (0.5 * s).exp()).log_prob(x).sum(1)
    kl = (q.log_prob(out.z) - p.log_prob(out.z)).sum(1)
    torch.testing.assert_close(out.nll, nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.kl, kl, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.loss, (nll + 2.0 * kl).mean(), rtol=1e-5, atol=1e-5)


def test_shapes(backend):
    encoder, decoder = networks(7, 2, backend)
    x = torch.randn(4, 7, device=backend)
    mu, logvar = encoder(x).chunk(2, 1)
    for k, rows in ((1, (4,)), (3, (3, 4))):
        for reduction, shape in (("mean", ()), ("sum", ()), ("none", (4,))):
            out = vae_fast.FusedELBO(num_samples=k, reduction=reduction)(x, mu, logvar, decoder)
            assert out.loss.shape == shape
            assert out.nll.shape == out.log_q.shape == out.log_p.shape == out.kl.shape == rows
            assert out.z.shape == (*rows, 2)


def test_the_terms_are_differentiable(fused, key):
    """A loss of one's own from out.nll and out.kl, beside out.loss."""
    encoder, decoder = networks(9, 3, fused)
    x, key = torch.randn(5, 9, device=fused), key.to(fused)
    weight = torch.rand(5, device=fused)

    def gradients():
        mu, logvar = encoder(x).chunk(2, 1)
        out = vae_fast.FusedELBO()(x, mu, logvar, decoder, key=key)
        total = out.loss + (weight * out.nll).sum() + 0.3 * out.kl.square().sum() + out.z.sum()
        return torch.autograd.grad(total, [*encoder.parameters(), *decoder.parameters()])

    ours = gradients()
    with vae_fast.use_backend("reference"):
        theirs = gradients()
    for a, b in zip(ours, theirs):
        assert_close(a, b)


@pytest.mark.parametrize("inplace", [False, True])
def test_backward_twice_and_accumulation(inplace, fused, key):
    encoder, decoder = networks(9, 3, fused)
    x, key = torch.randn(5, 9, device=fused), key.to(fused)
    elbo = vae_fast.FusedELBO(inplace=inplace)
    parameters = [*encoder.parameters(), *decoder.parameters()]

    def output():
        mu, logvar = encoder(x).chunk(2, 1)
        return elbo(x, mu, logvar, decoder, key=key).loss

    once = torch.autograd.grad(output(), parameters)
    loss = output()
    (5 * loss).backward(retain_graph=True)
    loss.backward()
    for p, g in zip(parameters, once):
        torch.testing.assert_close(p.grad, 6 * g, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_refuses(reduction, fused):
    """Asked for, a graph of the gradients would miss the kernels' own second derivatives."""
    w = torch.randn(5, 9, device=fused, requires_grad=True)
    x, log = torch.randn(5, 9, device=fused), torch.zeros(5, device=fused)
    z, log_q, log_p = vae_fast.reparameterize(w**2, w.sin())
    loss, nll = vae_fast.fused_elbo(x, w**2, w.sin(), log, log, reduction=reduction)
    for result in (z, log_q, log_p, loss, nll, vae_fast.gaussian_nll(x, w**2, w.sin())):
        with pytest.raises(NotImplementedError, match="double backward"):
            torch.autograd.grad(result.sum(), w, create_graph=True)


def test_an_empty_batch_in_place(fused):
    decoder = torch.nn.Linear(3, 18).to(fused)
    x, mu = torch.empty(0, 9, device=fused), torch.empty(0, 3, device=fused, requires_grad=True)
    for decode in (decoder, lambda z: decoder(z).split(9, 1)):
        out = vae_fast.FusedELBO(reduction="sum", inplace=True)(x, mu, mu * 1, decode)
        out.loss.backward()
        assert out.loss == 0


def test_no_grad_computes_no_gradient(fused, key):
    encoder, _ = networks(9, 3, fused)
    x = torch.randn(5, 9, device=fused)
    with torch.no_grad():
        mean = torch.full((5, 9), 0.5, device=fused)
        before = mean.clone()
        out = vae_fast.FusedELBO(inplace=True)(
            x, *encoder(x).chunk(2, 1), lambda z: (mean, torch.zeros_like(mean)), key=key.to(fused)
        )
    assert not out.loss.requires_grad
    assert torch.equal(mean, before)


# ---- in place --------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_inplace_writes_over_the_decoders_output(packed, fused):
    kept = []
    x = torch.randn(5, 9, device=fused)
    encoder, decoder = networks(9, 3, fused)

    def decode(z):
        kept.append(decoder(z))
        return kept[0] if packed else kept[0].chunk(2, 1)

    mu, logvar = encoder(x).chunk(2, 1)
    out = vae_fast.FusedELBO(inplace=True)(x, mu, logvar, decode)
    output = kept[0]
    seen = []
    output.register_hook(lambda g: seen.append(g.data_ptr()))
    version = output._version
    assert version > 0
    out.loss.backward()
    if packed:
        assert seen == [output.data_ptr()]


def test_inplace_fails_loudly_when_the_decoder_needs_its_output(fused):
    """A sigmoid differentiates from its own result, which is gone."""
    x = torch.randn(5, 9, device=fused)
    encoder, decoder = networks(9, 3, fused)
    decoder.append(nn.Sigmoid())
    mu, logvar = encoder(x).chunk(2, 1)
    out = vae_fast.FusedELBO(inplace=True)(x, mu, logvar, decoder)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def leaf(z, x):
    return torch.zeros(5, 9, device=z.device, requires_grad=True), z.new_zeros(())


def constant_alias(z, x):
    h = z.repeat(1, 4)
    return h[:, :9], h.detach()[:, 1:10]


def leaf_view(z, x):
    p = torch.zeros(9, 5, device=z.device, requires_grad=True)
    return p.t(), z.new_zeros(())


def expanded(z, x):
    return z.sum(1, keepdim=True).expand(5, 9), z.new_zeros(())


def same_twice(z, x):
    h = z.repeat(1, 3)
    return h, h


def overlapping(z, x):
    h = z.repeat(1, 4)
    return h[:, :9], h[:, 1:10]


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (leaf, "overwrite mean, which is a leaf"),
        (leaf_view, "overwrite mean, which is a leaf"),
        (constant_alias, "overwrite scale, whose memory mean shares"),
        (expanded, "memory of its own"),
        (same_twice, "memory of their own"),
        (overlapping, "memory of their own"),
    ],
)
def test_inplace_refuses_what_is_not_its_to_overwrite(decode, message, fused):
    x = torch.randn(5, 9, device=fused)
    mu = torch.randn(5, 3, device=fused, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        vae_fast.FusedELBO(inplace=True)(x, mu, mu, lambda z: decode(z, x))


def test_inplace_refuses_the_latent_itself(fused):
    x = torch.randn(5, 3, device=fused)
    mu = torch.randn(5, 3, device=fused, requires_grad=True)
    with pytest.raises(ValueError, match="overwrite z"):
        vae_fast.FusedELBO(inplace=True)(x, mu, mu, lambda z: (z, z.new_zeros(())))


# ---- what is saved and allocated -------------------------------------------------------------


def saved_bytes(fn):
    """Bytes of distinct memory that autograd keeps for backward while fn builds its graph."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = fn()
    del out
    return storages


def test_only_inputs_or_gradients_are_saved(fused):
    rows, size, latent = 16, 512, 8
    data = rows * size * 4
    x = torch.randn(rows, size, device=fused)
    mean, s = (torch.randn(rows, size, device=fused, requires_grad=True) for _ in range(2))
    mu, logvar = (torch.randn(rows, latent, device=fused, requires_grad=True) for _ in range(2))
    _, log_q, log_p = (t.detach() for t in vae_fast.reparameterize(mu, logvar))

    saved = saved_bytes(lambda: vae_fast.reparameterize(mu, logvar))
    own = {mu.data_ptr(), logvar.data_ptr()}
    assert sum(n for p, n in saved.items() if p not in own) <= 16  # the key

    saved = saved_bytes(lambda: vae_fast.gaussian_nll(x, mean, s))
    assert set(saved) == {x.data_ptr(), mean.data_ptr(), s.data_ptr()}

    saved = saved_bytes(lambda: vae_fast.fused_elbo(x, mean, s, log_q, log_p))
    assert sum(saved.values()) == 2 * data  # the two gradients


def test_inplace_allocates_nothing_of_the_datas_size(cpp):
    """Counted by PyTorch's own memory profiler, on the CPU."""
    rows, size = 64, 4096
    x = torch.randn(rows, size)
    leaves = [torch.randn(rows, size, requires_grad=True) for _ in range(2)]
    log_q, log_p = torch.randn(rows), torch.randn(rows)

    def peak(inplace):
        outputs = [(t * 1.0) for t in leaves]
        buffers.clear()  # memory of earlier steps would be used again
        with torch.profiler.profile(profile_memory=True) as profile:
            loss, _ = vae_fast.fused_elbo(x, *outputs, log_q, log_p, inplace=inplace)
            torch.autograd.grad(loss, outputs)
        return max(e.self_cpu_memory_usage for e in profile.key_averages())

    assert peak(inplace=False) >= rows * size * 4
    assert peak(inplace=True) < rows * size * 4 / 8


# ---- the module ------------------------------------------------------------------------------


def test_repr_names_what_is_not_the_default():
    text = repr(vae_fast.FusedELBO(beta=4.0, inplace=True, likelihood_clamp=(-3, 3)))
    assert text == "FusedELBO(beta=4.0, likelihood_clamp=(-3, 3), inplace=True)"


def test_clamps_reach_both_passes(backend, key):
    encoder, decoder = networks(9, 3, backend)
    x = torch.randn(5, 9, device=backend)
    mu, logvar = encoder(x).chunk(2, 1)
    elbo = vae_fast.FusedELBO(posterior_clamp=(-0.1, 0.1), likelihood_clamp=(-0.05, 0.05))
    out = elbo(x, mu, 10 * logvar, decoder, key=key.to(backend))
    z, log_q, _ = reference.reparameterize(mu, (10 * logvar).clamp(-0.1, 0.1), key=key.to(backend))
    torch.testing.assert_close(out.z, z)
    torch.testing.assert_close(out.log_q, log_q)
    mean, s = decoder(z).chunk(2, 1)
    torch.testing.assert_close(out.nll, reference.gaussian_nll(x, mean, s.clamp(-0.05, 0.05)))


def test_numpy_scalars_are_numbers():
    options = {"beta": np.float32(0.5), "num_samples": np.int64(2), "inplace": np.bool_(True)}
    elbo = vae_fast.FusedELBO(**options, df=np.float32(3), likelihood="student_t")
    elbo.capacity = np.float64(1.5)
    for name, value in (options | {"df": 3.0, "capacity": 1.5}).items():
        kept = getattr(elbo, name)
        assert type(kept) in (int, float, bool)
        assert kept == value


def test_an_option_given_as_a_list_is_kept_as_it_was():
    bounds = [-1.0, 1.0]
    elbo = vae_fast.FusedELBO(posterior_clamp=bounds)
    bounds[1] = -0.5
    assert elbo.posterior_clamp == (-1.0, 1.0)
    t = torch.zeros(2, 3)
    key = torch.tensor([7, 11], dtype=torch.uint64)
    out = elbo(t, t, t, lambda z: (z, t), key=key)
    assert torch.equal(out.z, vae_fast.reparameterize(t, t, key=key)[0])
