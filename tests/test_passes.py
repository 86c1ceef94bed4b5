"""Both fused passes on every backend, against the reference in fp64: values and gradients."""

import math

import pytest
import torch
from accuracy import assert_accurate, eager_latent, eager_nll, is_interpreted

import vae_fast
from vae_fast import noise, ops, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PARAMS = ops.PARAMS


def raw_scale(param, shape, dtype, device):
    s = torch.rand(shape) + 0.3 if param in ("std", "var") else torch.randn(shape)
    return s.to(device, dtype)


def results_and_gradients(fn, inputs, upstream):
    """The outputs of fn, and the gradients of its inputs for the upstream gradients given."""
    inputs = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs
    ]
    outputs = fn(*inputs)
    total = sum((o * g.to(o.dtype)).sum() for o, g in zip(outputs, upstream))
    return [o.detach() for o in outputs] + list(torch.autograd.grad(total, inputs))


def compare(fused_fn, eager_fn, reference_fn, inputs, upstream, dtype):
    """Fused, eager PyTorch in the same dtype, and the fp64 truth on the same (rounded) inputs."""
    truth = results_and_gradients(reference_fn, [t.double() for t in inputs], upstream)
    eager = results_and_gradients(eager_fn, inputs, upstream)
    ours = results_and_gradients(fused_fn, inputs, upstream)
    interpreted = is_interpreted(inputs[0].device)
    assert_accurate(ours, eager, truth, dtype, truncates=interpreted and dtype == torch.bfloat16)


# ---- latent ----------------------------------------------------------------------------------


def check_latent(device, batch, latent, dtype, param="logvar", num_samples=None, clamp=None,
                 scalar=False, first_row=0):  # fmt: skip
    key = torch.tensor([batch, 13], dtype=torch.uint64, device=device)
    mu = torch.randn(batch, *latent).to(device, dtype)
    s = raw_scale(param, () if scalar else mu.shape, dtype, device)
    eps = noise.normal(key, batch, num_samples, latent, first_row, dtype)
    rows = (batch,) if num_samples is None else (num_samples, batch)
    upstream = [torch.randn(*rows, *latent), torch.randn(rows), torch.randn(rows)]
    upstream = [u.to(device, dtype).double() for u in upstream]
    compare(
        lambda m, r: vae_fast.reparameterize(
            m, r, param, num_samples, key, first_row=first_row, clamp=clamp
        ),
        lambda m, r: eager_latent(m, r, eps, param, clamp),
        lambda m, r: reference.reparameterize(m, r, param, num_samples, key, clamp=clamp, eps=eps),
        [mu, s],
        upstream,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("param", PARAMS)
def test_latent(param, dtype, fused):
    check_latent(fused, 7, (33,), dtype, param)


# One size per regime of the kernels: below a quad, ragged quads, whole vectors, several tiles.
@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 63, 256, 784, 1025, 4097])
def test_latent_sizes(size, fused):
    check_latent(fused, 3, (size,), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_samples", [1, 2, 5])
def test_latent_samples(num_samples, dtype, fused):
    check_latent(fused, 6, (2, 5), dtype, num_samples=num_samples, first_row=9)


@pytest.mark.parametrize("param", PARAMS)
@pytest.mark.parametrize("scalar", [False, True])
def test_latent_clamp_and_scalar(param, scalar, fused):
    check_latent(fused, 9, (20,), torch.float32, param, 2, (0.35, 0.9), scalar)
    check_latent(fused, 9, (20,), torch.float64, param, None, (0.35, 0.9), scalar)


def test_latent_empty_batch(fused):
    mu = torch.zeros(0, 5, device=fused, requires_grad=True)
    z, log_q, log_p = vae_fast.reparameterize(mu, mu, num_samples=2)
    assert (z.shape, log_q.shape, log_p.shape) == ((2, 0, 5), (2, 0), (2, 0))
    (z.sum() + log_q.sum() + log_p.sum()).backward()
    assert mu.grad.shape == (0, 5)


def latent_views():
    """Equal values in different memory: a chunk, a transpose, a step, a channels-last tensor."""
    base = torch.randn(6, 2, 4, 3)

    def embed(shape, view):
        storage = torch.full(shape, torch.nan)
        view(storage).copy_(base)
        return view(storage)

    return base, {
        "chunk": embed((6, 4, 4, 3), lambda t: t.chunk(2, 1)[1]),
        "transposed batch": embed((2, 4, 3, 6), lambda t: t.permute(3, 0, 1, 2)),
        "step": embed((6, 2, 4, 6), lambda t: t[..., ::2]),
        "row step": embed((12, 2, 4, 3), lambda t: t[::2]),
        "channels last": embed((6, 4, 3, 2), lambda t: t.permute(0, 3, 1, 2)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_latent_strides(dtype, fused, key):
    base, views = latent_views()
    base = base.to(fused, dtype)
    upstream = torch.randn(3, *base.shape, device=fused, dtype=dtype)

    def run(mu, s, up):
        mu, s = mu.detach().requires_grad_(), s.detach().requires_grad_()
        z, log_q, log_p = vae_fast.reparameterize(mu, s, num_samples=3, key=key.to(fused))
        total = (z * up).sum() + log_q.sum() + log_p.sum()
        return [z, log_q, log_p, *torch.autograd.grad(total, (mu, s))]

    expected = run(base, base, upstream)
    for name, view in views.items():
        view = view.to(fused, dtype)
        assert torch.equal(view, base), name
        for got, want in zip(run(view, view, upstream), expected):
            torch.testing.assert_close(got, want, msg=lambda m, n=name: f"{n}: {m}")
        # z's gradient may come with any strides, too.
        up = upstream.transpose(0, 1).contiguous().transpose(0, 1)
        for got, want in zip(run(view, base, up), expected):
            torch.testing.assert_close(got, want)
    one = upstream.new_ones(()).expand_as(upstream)
    for got, want in zip(run(base, base, one), run(base, base, torch.ones_like(upstream))):
        torch.testing.assert_close(got, want)


# ---- likelihood ------------------------------------------------------------------------------


def check_nll(device, batch, event, dtype, param="logvar", num_samples=None, clamp=None,
              scalar=False, masked=False):  # fmt: skip
    shape = (batch, *event) if num_samples is None else (num_samples, batch, *event)
    x = torch.randn(batch, *event).to(device, dtype)
    mean = torch.randn(shape).to(device, dtype)
    s = raw_scale(param, () if scalar else shape, dtype, device)
    mask = (torch.rand(batch, *event) > 0.3).to(device) if masked else None
    upstream = [torch.randn(shape[: -len(event)]).to(device).double()]
    compare(
        lambda x, m, r: [vae_fast.gaussian_nll(x, m, r, param, clamp, mask)],
        lambda x, m, r: [eager_nll(x, m, r, param, clamp, mask)],
        lambda x, m, r: [reference.gaussian_nll(x, m, r, param, clamp, mask)],
        [x, mean, s],
        upstream,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("param", PARAMS)
def test_nll(param, dtype, fused):
    check_nll(fused, 5, (37,), dtype, param)


# Below a vector, ragged, several tiles, several pieces of a row.
@pytest.mark.parametrize("size", [1, 3, 5, 63, 784, 4097, 20011])
def test_nll_sizes(size, fused):
    check_nll(fused, 3, (size,), torch.float32)
    check_nll(fused, 2, (size,), torch.float32, scalar=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_samples", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_nll_samples(num_samples, dtype, masked, fused):
    check_nll(fused, 5, (3, 6), dtype, num_samples=num_samples, masked=masked)


@pytest.mark.parametrize("param", PARAMS)
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_nll_clamp_scalar_mask(param, scalar, masked, fused):
    for dtype in (torch.float32, torch.float64):
        check_nll(fused, 6, (23,), dtype, param, None, (0.35, 0.9), scalar, masked)


def test_nll_empty_batch(fused):
    x = torch.zeros(0, 5, device=fused, requires_grad=True)
    nll = vae_fast.gaussian_nll(x, x, x)
    assert nll.shape == (0,)
    nll.sum().backward()
    assert x.grad.shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nll_strides(dtype, fused):
    base, views = latent_views()
    x, base = torch.randn(base.shape).to(fused, dtype), base.to(fused, dtype)

    def run(x, mean, s):
        x, mean, s = (t.detach().requires_grad_() for t in (x, mean, s))
        nll = vae_fast.gaussian_nll(x, mean, s)
        return [nll, *torch.autograd.grad(nll.sum(), (x, mean, s))]

    # The order of summation may follow memory.
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    expected = run(x, base, base)
    for name, view in views.items():
        view = view.to(fused, dtype)
        for args in ((x, view, base), (x, base, view), (x, view, view)):
            for got, want in zip(run(*args), expected):
                torch.testing.assert_close(got, want, **close, msg=lambda m, n=name: f"{n}: {m}")
    last = x.to(memory_format=torch.channels_last)
    for got, want in zip(run(last, views["channels last"].to(fused, dtype), base), expected):
        torch.testing.assert_close(got, want, **close)


@pytest.mark.parametrize("side", [2, 5, 6])
def test_nll_packed_gradient_is_packed(side, fused):
    """A row may be of whole vectors while its second half begins within one: 3 channels of 2x2."""
    x = torch.randn(4, 3, side, side, device=fused)
    packed = torch.randn(4, 6, side, side, device=fused).to(memory_format=torch.channels_last)
    packed.requires_grad_()
    nll = vae_fast.gaussian_nll(x, packed, None)
    torch.testing.assert_close(nll, reference.gaussian_nll(x, packed.detach(), None))
    nll.sum().backward()
    mean, s = packed.detach().chunk(2, 1)
    mean, s = mean.requires_grad_(), s.requires_grad_()
    reference.gaussian_nll(x, mean, s).sum().backward()
    assert packed.grad.stride() == packed.stride()
    torch.testing.assert_close(packed.grad, torch.cat([mean.grad, s.grad], 1), rtol=1e-4, atol=1e-5)


def test_mask_hides_nan(fused):
    x = torch.randn(6, 11, device=fused)
    mask = torch.rand(6, 11, device=fused) > 0.5
    mask[2] = False
    hidden = ~mask
    broken = x.masked_fill(hidden, torch.nan).requires_grad_()
    mean = torch.randn_like(x).masked_fill(hidden, torch.inf).requires_grad_()
    s = torch.randn_like(x).masked_fill(hidden, torch.nan).requires_grad_()
    nll = vae_fast.gaussian_nll(broken, mean, s, mask=mask)
    assert torch.all(torch.isfinite(nll))
    assert nll[2] == 0
    for g in torch.autograd.grad(nll.sum(), (broken, mean, s)):
        assert torch.all(g[hidden] == 0)
        assert torch.all(torch.isfinite(g))


def test_mask_broadcasts(fused):
    x, mean, s = (torch.randn(6, 3, 4, 4, device=fused) for _ in range(3))
    mask = torch.rand(6, 1, 4, 4, device=fused) > 0.5
    torch.testing.assert_close(
        vae_fast.gaussian_nll(x, mean, s, mask=mask), reference.gaussian_nll(x, mean, s, mask=mask)
    )


# ---- extremes --------------------------------------------------------------------------------


def test_long_latents_are_summed_as_trees(cpp):
    """Whatever the number of threads, which share a row."""
    mu, s = torch.zeros(1, 2**20), torch.zeros(1, 2**20)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            key = torch.tensor([1, 2], dtype=torch.uint64)
            results.append(vae_fast.reparameterize(mu, s, key=key, num_samples=2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))
    z, log_q, log_p = results[0]
    # z is the noise itself.
    exact = (-0.5 * z.double() ** 2).sum(-1) - 0.5 * math.log(2 * math.pi) * mu.numel()
    for got in (log_q, log_p):
        torch.testing.assert_close(got.double(), exact, rtol=1.5e-7, atol=0.0)


def test_softplus_of_large_scales(backend):
    """σ = s from 40 on, to any rounding; e^s is soon no fp32 number any more."""
    s = torch.tensor([[40.0], [79.0], [81.0], [89.0], [100.0], [1e4]], device=backend)
    s, x = s.requires_grad_(), torch.ones_like(s)
    nll = vae_fast.gaussian_nll(x, torch.zeros_like(x), s, "softplus")
    kl = vae_fast.gaussian_kl(x, s, param="softplus")
    sigma = s.detach().double().requires_grad_()
    r = 1.0 / sigma
    truth = (0.5 * r * r + sigma.log() + reference.HALF_LOG_2PI)[:, 0]
    divergence = (0.5 * sigma.square() - sigma.log())[:, 0]  # of μ = 1
    for got, want in ((nll, truth), (kl, divergence)):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0.0)
        g, w = torch.autograd.grad(got.sum(), s)[0], torch.autograd.grad(want.sum(), sigma)[0]
        torch.testing.assert_close(g.double(), w, rtol=1e-6, atol=0.0)


def test_extreme_logvar_stays_finite(fused):
    """Finite where the exact result is, and a zero residual costs nothing at any τ."""
    s = torch.tensor([[-200.0], [-80.0], [80.0], [170.0], [-300.0], [300.0]], device=fused)
    x = torch.tensor([[1e-35], [1e-10], [1e10], [1e30], [0.0], [0.0]], device=fused)
    mean = torch.zeros_like(x).requires_grad_()
    s.requires_grad_()
    nll = vae_fast.gaussian_nll(x, mean, s)
    nll.sum().backward()
    truth_mean, truth_s = (
        mean.detach().double().requires_grad_(),
        s.detach().double().requires_grad_(),
    )
    truth = reference.gaussian_nll(x.double(), truth_mean, truth_s)
    truth.sum().backward()
    torch.testing.assert_close(nll.double(), truth, rtol=2e-5, atol=0)
    representable = truth_mean.grad.abs() < 3e38
    torch.testing.assert_close(
        mean.grad.double()[representable], truth_mean.grad[representable], rtol=5e-5, atol=1e-38
    )
    torch.testing.assert_close(s.grad.double(), truth_s.grad, rtol=5e-5, atol=1e-6)


def test_variances_that_are_no_normal_numbers(fused, key):
    """Their roots are, and so is all that is made of those."""
    s = torch.tensor([1e-37, 1e-38, 1e-40, 1e-44]).to(fused).expand(16, 4).mT.clone()
    x = (s.detach().double().sqrt() * torch.linspace(-3, 3, 16, device=fused)).float()
    mean, s = torch.zeros_like(x).requires_grad_(), s.requires_grad_()
    nll = vae_fast.gaussian_nll(x, mean, s, "var")
    m, v = (t.detach().double().requires_grad_() for t in (mean, s))
    truth = reference.gaussian_nll(x.double(), m, v, "var")
    torch.testing.assert_close(nll.double(), truth, rtol=2e-5, atol=0)
    got, want = (torch.autograd.grad(t.sum(), u)[0] for t, u in ((nll, mean), (truth, m)))
    torch.testing.assert_close(got.double(), want, rtol=5e-5, atol=0)

    mu = torch.zeros_like(s)
    z = vae_fast.reparameterize(mu, s, "var", key=key.to(fused))[0]
    eps = noise.normal(key.to(fused), 4, None, (16,)).double()
    torch.testing.assert_close(z.double(), v.sqrt() * eps, rtol=1e-5, atol=1e-26)
    (got,) = torch.autograd.grad(z.sum(), s)
    torch.testing.assert_close(got.double(), 0.5 * eps / v.sqrt(), rtol=1e-5, atol=0)


def test_fp16_logvar_of_80(fused):
    x = torch.tensor([[2.0], [0.0]], dtype=torch.float16, device=fused)
    s = torch.tensor([[80.0], [-80.0]], dtype=torch.float16, device=fused)
    nll = vae_fast.gaussian_nll(x, torch.zeros_like(x), s)
    torch.testing.assert_close(nll.cpu(), torch.tensor([40.0, -40.0]) + reference.HALF_LOG_2PI)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("param", PARAMS)
def test_bad_values_stay_in_their_row(bad, param, fused, key):
    mu = torch.randn(6, 9, device=fused)
    s = raw_scale(param, (6, 9), torch.float32, fused)
    for target in (0, 1):
        inputs = [mu.clone(), s.clone()]
        inputs[target][3, 4] = bad
        m, r = (t.requires_grad_() for t in inputs)
        z, log_q, log_p = vae_fast.reparameterize(m, r, param, key=key.to(fused))
        g = torch.autograd.grad(z.square().sum() + log_q.sum() + log_p.sum(), (m, r))
        clean = torch.arange(6) != 3
        for t in (z, log_q, log_p, *g):
            assert torch.all(torch.isfinite(t[clean]))
        m, r = (t.detach().requires_grad_() for t in inputs)
        nll = vae_fast.gaussian_nll(mu, m, r, param)
        for t in (nll, *torch.autograd.grad(nll.sum(), (m, r))):
            assert torch.all(torch.isfinite(t[clean]))
        if math.isnan(bad):
            # And it does reach its own row.
            assert torch.isnan(nll[3])
            assert torch.isnan(log_q[3] if target else log_p[3])
            assert torch.isnan(g[target][3, 4])


def test_same_input_gives_the_same_bits(fused, key):
    rows, size = (9, 2501) if is_interpreted(fused) else (65, 9001)
    mu, s = torch.randn(rows, 37, device=fused), torch.randn(rows, 37, device=fused)
    x, mean, logvar = (torch.randn(rows, size, device=fused) for _ in range(3))

    def run():
        latent = vae_fast.reparameterize(mu, s, key=key.to(fused))
        m, r = mean.clone().requires_grad_(), logvar.clone().requires_grad_()
        loss, nll = vae_fast.fused_elbo(x, m, r, *latent[1:])
        loss.backward()
        return [*latent, loss, nll, m.grad, r.grad]

    first = run()
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            assert all(torch.equal(a, b) for a, b in zip(run(), first))
    finally:
        torch.set_num_threads(threads)


def test_every_output_element_is_written(fused, key, monkeypatch):
    """Fresh memory is poisoned with NaN, so an element that no kernel wrote would show."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.isnan(torch.empty(3)).all()
        mu = torch.randn(5, 37, device=fused, requires_grad=True)
        x, m, s = (torch.randn(15, 1030, device=fused, requires_grad=True) for _ in range(3))
        z, log_q, log_p = vae_fast.reparameterize(mu, mu, num_samples=3, key=key.to(fused))
        nll = vae_fast.gaussian_nll(x, m, s)
        loss, rows = vae_fast.fused_elbo(x.detach()[:5], m, s, log_q, log_p)
        total = z.sum() + nll.sum() + loss
        for t in (z, log_q, log_p, nll, loss, rows, *torch.autograd.grad(total, (mu, x, m, s))):
            assert torch.all(torch.isfinite(t))
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_key_need_not_lie_in_one_piece(fused, key):
    mu, scale = (torch.randn(3, 6, device=fused, requires_grad=True) for _ in range(2))
    levels = torch.randint(256, (3, 9), dtype=torch.uint8, device=fused)
    mean = torch.zeros(3, 9, device=fused, requires_grad=True)
    whole = key.to(fused)
    strided = whole.view(torch.int64).repeat_interleave(2).view(torch.uint64)[::2]
    assert strided.stride() == (2,)
    assert torch.equal(strided.cpu(), key)
    for run, inputs in (
        (lambda k: vae_fast.reparameterize(mu, scale, key=k)[0], (mu, scale)),
        (lambda k: vae_fast.likelihood_nll(levels, mean, 0.0, dequantize=True, key=k), (mean,)),
    ):
        got, want = run(strided), run(whole)
        assert torch.equal(got, want)
        gradients = (torch.autograd.grad(t.sum(), inputs) for t in (got, want))
        for g, wanted in zip(*gradients, strict=True):
            assert torch.equal(g, wanted)
