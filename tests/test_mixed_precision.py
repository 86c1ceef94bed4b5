"""autocast, GradScaler and mixed dtypes: terms in fp32, gradients in their parameters' dtypes."""

import pytest
import torch
from accuracy import eager_latent, eager_nll
from conftest import FUSED, _skip_unless_it_runs

import vae_fast
from vae_fast import noise, reference

pytestmark = [
    pytest.mark.works_with("autocast and GradScaler"),
    # Triton's interpreter, which casts to fp16 with NumPy.
    pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning"),
]

HALVES = [torch.bfloat16, torch.float16]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def needs(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")


def truncates(device):
    """Triton's interpreter cuts bf16 off instead of rounding it."""
    return vae_fast.backends.backend_for(device.type) == "triton" and device.type == "cpu"


def assert_rounded(got, truth, units=0.5):
    """``got`` is the truth, computed in fp32 and rounded once: half a unit in the last place."""
    dtype = got.dtype
    info = torch.finfo(dtype)
    want = truth.to(dtype)
    assert got.shape == truth.shape
    assert not got.isnan().any()
    # Infinite exactly where the true value overflows, with its sign.
    assert torch.equal(got.isinf(), want.isinf())
    finite = want.isfinite()
    assert torch.equal(got[~finite], want[~finite])
    if not finite.any():
        return
    got, truth = got[finite].double(), truth[finite].double()
    arithmetic = 4e-6 * truth.abs().max() if dtype == F32 else 4e-6 * truth.abs()
    # Triton's interpreter is wrong about subnormal bf16 numbers.
    least = info.smallest_normal * (1.0 if units > 0.5 and dtype == BF16 else info.eps)
    bound = units * info.eps * truth.abs() * 1.001 + arithmetic + least
    worst = ((got - truth).abs() - bound).max().item()
    assert worst <= 0, f"{dtype}: {worst:.3g} beyond the bound"


# ---- autocast ----------------------------------------------------------------------------------


MODELS = {
    "mlp": lambda **o: vae_fast.VAE.mlp((12,), 5, hidden=(16,), **o),
    "conv": lambda **o: vae_fast.VAE.conv((2, 6, 6), 3, channels=(4,), **o),
    "one variance": lambda **o: vae_fast.VAE.mlp((12,), 5, hidden=(16,), variance="scalar", **o),
    "per channel": lambda **o: vae_fast.VAE.conv((2, 6, 6), 3, (4,), variance="channel", **o),
}


def by_hand(vae, x, eps, latent, nll):
    """The loss of ``vae`` from the functions of one row's terms."""
    mu, scale = vae.encoder(x).chunk(2, 1)
    z, log_q, log_p = latent(mu, scale, eps, "logvar")
    out = vae.decoder(z)
    mean, s = out if isinstance(out, tuple) else out.chunk(2, 1)
    return (nll(x, mean, s, "logvar", vae.elbo.likelihood_clamp) + log_q - log_p).mean()


def gradient(vae):
    return torch.cat([p.grad.double().flatten() for p in vae.parameters()])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_a_training_step_under_autocast(model, inplace, dtype, backend, key):
    """As close to fp64 as the same step written by hand under the same autocast."""
    vae = MODELS[model](inplace=inplace).to(backend)
    x = torch.rand(8, *vae._architecture["event_shape"], device=backend)
    key = key.to(backend)
    eps = noise.normal(key, 8, None, vae.latent_shape)

    with torch.autocast(backend.type, dtype):
        out = vae(x, key=key)
    assert [t.dtype for t in out[:5]] == [F32, F32, F32, F32, dtype]
    out.loss.backward()
    assert {p.grad.dtype for p in vae.parameters()} == {F32}
    ours = gradient(vae)

    vae.zero_grad()
    with torch.autocast(backend.type, dtype):
        hand = by_hand(vae, x, eps, eager_latent, eager_nll)
    hand.backward()
    theirs = gradient(vae)

    vae.zero_grad()
    true = by_hand(
        vae.double(), x.double(), eps.double(),
        lambda mu, s, e, param: reference.reparameterize(mu, s, param, eps=e),
        reference.gaussian_nll,
    )  # fmt: skip
    true.backward()
    truth = gradient(vae)
    slack = 3.0 if truncates(backend) else 1.25  # of two roundings of one size
    error, bound = (ours - truth).norm(), (theirs - truth).norm()
    assert 0 < error <= slack * bound
    assert (out.loss - true).abs() <= slack * (hand - true).abs() + 2 * 2.0**-8 * true.abs()


@pytest.mark.parametrize(
    "options",
    [
        dict(num_samples=3, objective="iwae", estimator="dreg"),
        dict(num_samples=2, estimator="stl"),
        dict(kl="analytic", free_bits=0.1),
        dict(likelihood_scale="optimal"),
        dict(likelihood="bernoulli"),
        dict(likelihood="logistic", x_scale=(1 / 255, 0.0)),
        dict(prior=(torch.nn.Parameter(torch.zeros(5)), torch.nn.Parameter(torch.zeros(5)))),
        dict(reduction="none"),
    ],
    ids=lambda options: "-".join(map(str, list(options)[:1] + list(options.values())[:1]))[:24],
)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_option_under_autocast(options, dtype, key):
    vae = vae_fast.VAE.mlp((12,), 5, hidden=(16,), **options)
    x = torch.rand(8, 12)
    grads = []
    for enabled in (True, False):
        vae.zero_grad()
        with torch.autocast("cpu", dtype, enabled=enabled):
            out = vae(x, key=key)
        assert [t.dtype for t in out[:4]] == [F32] * 4
        assert out.z.dtype == (dtype if enabled else F32)
        out.loss.mean().backward()
        assert all(p.grad.dtype == F32 for p in vae.parameters())
        grads.append(gradient(vae))
    error = (grads[0] - grads[1]).norm() / grads[1].norm()
    assert 0 < error < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_call_inside_autocast_casts_nothing(device, key):
    """The functions take their tensors as they come: no copy of fp32 data in half precision."""
    needs(device)
    x, mean, s = torch.randn(3, 4, 6, device=device)
    want = vae_fast.gaussian_nll(x, mean, s)
    with torch.autocast(device, BF16):
        assert torch.equal(vae_fast.gaussian_nll(x, mean, s), want)
        assert vae_fast.reparameterize(mean, s, key=key.to(device))[0].dtype == F32


def test_reductions_under_autocast_train(key):
    """Adam on fp32 master weights with a bf16 forward pass comes down as far as fp32 does."""
    x = torch.rand(32, 12)
    losses = {}
    for enabled in (False, True):
        torch.manual_seed(1)
        vae = vae_fast.VAE.mlp((12,), 2, hidden=(16,))
        optimizer = torch.optim.Adam(vae.parameters(), 0.01)
        for step in range(60):
            optimizer.zero_grad()
            with torch.autocast("cpu", BF16, enabled=enabled):
                loss = vae(x, key=key, first_row=step * 32).loss
            loss.backward()
            optimizer.step()
            losses.setdefault(enabled, []).append(loss.item())
    fall = losses[False][0] - losses[False][-1]
    assert fall > 5
    assert abs(losses[True][-1] - losses[False][-1]) < 0.05 * fall


# ---- tensors of several dtypes -----------------------------------------------------------------

LATENTS = [(BF16, F32), (F16, F32), (F32, BF16), (BF16, BF16), (F16, F16), (F16, BF16)]


@pytest.mark.parametrize(("mu_dtype", "scale_dtype"), LATENTS)
@pytest.mark.parametrize("shape", ["full", "event", "scalar"])
def test_latents_of_several_dtypes(mu_dtype, scale_dtype, shape, backend, key):
    key = key.to(backend)
    mu = torch.randn(3, 5, device=backend).to(mu_dtype).requires_grad_()
    size = {"full": (3, 5), "event": (5,), "scalar": ()}[shape]
    s = (torch.randn(size, device=backend) * 0.5).to(scale_dtype).requires_grad_()
    z, log_q, log_p = vae_fast.reparameterize(mu, s, num_samples=2, key=key)
    assert (z.dtype, log_q.dtype, log_p.dtype) == (mu_dtype, F32, F32)
    g_z = torch.randn(2, 3, 5, device=backend).to(mu_dtype)
    g_rows = torch.randn(2, 2, 3, device=backend)
    grads = torch.autograd.grad((z, log_q, log_p), (mu, s), (g_z, *g_rows))
    assert [g.dtype for g in grads] == [mu_dtype, scale_dtype]

    eps = noise.normal(key, 3, 2, (5,)).double()
    mu64, s64 = (t.detach().double().requires_grad_() for t in (mu, s))
    true = reference.reparameterize(mu64, s64, num_samples=2, eps=eps)
    truth = torch.autograd.grad(true, (mu64, s64), (g_z.double(), *g_rows.double()))
    exact = not truncates(backend)
    for got, want in zip((z, log_q, log_p, *grads), (*true, *truth)):
        assert_close_enough(got, want, 0.5 if exact else 1.0, shared=want.dim() < 2)


def assert_close_enough(got, want, units, shared=False):
    """``assert_rounded`` for results of moderate size; a sum may round its shares."""
    eps = torch.finfo(got.dtype).eps
    error = (got.double() - want.double()).abs()
    bound = units * eps * (want.abs() + (want.abs().max() if shared else 0.0)) * 1.001
    bound = bound + 1e-5 * max(want.abs().max().item(), 1.0)
    assert got.shape == want.shape
    assert (error <= bound).all(), (error - bound).max()


LIKELIHOODS = [
    (F32, BF16, BF16), (F32, F16, F16), (F32, BF16, F32), (F32, F16, F32), (BF16, F32, F32),
    (F16, F32, BF16), (BF16, BF16, BF16), (F16, F16, F16), (torch.uint8, BF16, F32),
]  # fmt: skip


REDUCTIONS_AND_SHAPES = [
    ("mean", (3, 6)), ("none", (3, 6)), ("sum", (6,)), ("none", (6,)), ("mean", (3, 1)),
    ("mean", ()), ("none", ()),
]  # fmt: skip


@pytest.mark.parametrize("dtypes", LIKELIHOODS, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_likelihoods_of_several_dtypes(dtypes, inplace, backend):
    """x, mean and scale each of its own dtype, for each reduction and shape of the scale."""
    x_dtype, mean_dtype, scale_dtype = dtypes
    x = torch.rand(3, 6, device=backend)
    x = (x * 255).to(torch.uint8) if x_dtype == torch.uint8 else x.to(x_dtype)
    log_q, log_p = torch.randn(2, 3, device=backend)
    for reduction, size in REDUCTIONS_AND_SHAPES:
        mean = torch.randn(3, 6, device=backend).to(mean_dtype).requires_grad_()
        s = (torch.randn(size, device=backend) * 0.5).to(scale_dtype).requires_grad_()
        # Results of a computation, as inplace=True needs.
        loss, nll = vae_fast.fused_elbo(
            x, mean * 1, s * 1, log_q, log_p, 0.5, reduction, inplace=inplace
        )
        assert (loss.dtype, nll.dtype) == (F32, F32)
        weight = torch.tensor([1.0, 2.0, 0.5], device=backend) if reduction == "none" else 1.0
        grads = torch.autograd.grad((loss * weight).sum(), (mean, s))
        assert [g.dtype for g in grads] == [mean_dtype, scale_dtype]

        x64 = x if x.dtype == torch.uint8 else x.double()
        mean64, s64 = (t.detach().double().requires_grad_() for t in (mean, s))
        true_nll = reference.gaussian_nll(x64, mean64, s64)
        true = reference.elbo_loss(true_nll, log_q.double(), log_p.double(), 0.5, reduction)
        truth = torch.autograd.grad((true * weight).sum(), (mean64, s64))
        # Rounded by the pass, and in place or rescaled once more.
        units = (2.0 if truncates(backend) else 1.0) if reduction == "none" and inplace else 0.5
        units = max(units, 1.0 if truncates(backend) else 0.5)
        assert_close_enough(loss, true, 0.5)
        assert_close_enough(nll, true_nll, 0.5)
        assert_close_enough(grads[0], truth[0], units)
        assert_close_enough(grads[1], truth[1], units, shared=size != (3, 6))


@pytest.mark.parametrize("loss_scale", [2.0**16, 1000.0, 2.0**-10])
@pytest.mark.parametrize("dtype", [F32, *HALVES], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_scaled_losses(loss_scale, dtype, inplace, backend):
    """A factor on the loss is one on every gradient, though the forward pass wrote them before."""
    x, log_q = torch.rand(4, 6, device=backend), torch.zeros(4, device=backend)
    packed = torch.randn(4, 12, device=backend).to(dtype).mul(0.01).requires_grad_()
    loss, _ = vae_fast.fused_elbo(x, packed * 1, None, log_q, inplace=inplace)
    (grad,) = torch.autograd.grad(loss * loss_scale, packed)
    packed64 = packed.detach().double().requires_grad_()
    nll = reference.gaussian_nll(x.double(), packed64, None)
    (truth,) = torch.autograd.grad(nll.mean() * loss_scale, packed64)
    # A gradient written before its factor is known is rounded twice, unless that is a power of 2.
    units = 1.0 if loss_scale == 1000.0 and dtype == BF16 else 0.5
    assert_rounded(grad, truth, 2.0 if truncates(torch.device(backend)) else units)


# ---- GradScaler --------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_loss_scale_saves_small_gradients(reduction, inplace, device, key):
    """What underflows in fp16 without a loss scale is there with one, and right after unscaling."""
    needs(device)
    batch = 512
    x = torch.rand(batch, 6, device=device)
    # τ = e^6: gradients of about (x − m)/τ²/B = 3e-6/512, below the smallest fp16 number, 6e-8.
    options = dict(likelihood_scale=12.0, inplace=inplace, reduction=reduction)
    vae = vae_fast.VAE.mlp((6,), 2, (8,), **options).to(device)
    outputs = vae.decoder[-2].weight

    def step(enabled, scaler):
        vae.zero_grad()
        seen = []
        handle = vae.decoder.register_full_backward_hook(lambda m, gi, go: seen.append(go[0]))
        with torch.autocast(device, F16, enabled=enabled):
            loss = vae(x, key=key.to(device)).loss
            loss = loss.mean() if reduction == "none" else loss / batch ** (reduction == "sum")
        handle.remove()
        scaler.scale(loss).backward()
        optimizer = torch.optim.SGD(vae.parameters(), 0.1)
        scaler.unscale_(optimizer)
        return seen[0], outputs.grad.clone(), optimizer

    off = torch.amp.GradScaler(device, enabled=False)
    on = torch.amp.GradScaler(device, init_scale=2.0**16)
    _, want, _ = step(False, off)
    lost, _, _ = step(True, off)
    kept, got, optimizer = step(True, on)
    assert lost.dtype == kept.dtype == F16
    assert (lost == 0).float().mean() > 0.9
    assert (kept == 0).float().mean() < 0.02
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())
    before = [p.clone() for p in vae.parameters()]
    on.step(optimizer)
    assert any(not torch.equal(p, q) for p, q in zip(vae.parameters(), before))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_an_overflow_skips_the_step(inplace, dtype, device, key):
    needs(device)
    torch.manual_seed(0)
    vae = vae_fast.VAE.mlp((6,), 2, (8,), inplace=inplace).to(device)
    optimizer = torch.optim.SGD(vae.parameters(), 1e-3)
    largest = 2.0**24 if dtype == F16 else 2.0**127
    scaler = torch.amp.GradScaler(device, init_scale=largest, growth_interval=10**6)
    # The range of bf16 is that of fp32, so there the gradients have to be large as well.
    x = torch.rand(8, 6, device=device) * (1.0 if dtype == F16 else 10.0)
    skipped = moved = 0
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            out = vae(x, key=key.to(device))
        scaler.scale(out.loss).backward()
        before, scale = [p.clone() for p in vae.parameters()], scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(p, q) for p, q in zip(vae.parameters(), before))
        finite = all(p.grad.isfinite().all() for p in vae.parameters())
        # Where a gradient overflowed nothing moves, and the scale is halved.
        assert same == (not finite)
        assert scaler.get_scale() == (scale if finite else scale / 2)
        skipped, moved = skipped + same, moved + (not same)
        if moved == 3:
            break
    assert skipped > 0
    assert moved == 3
    assert all(p.isfinite().all() for p in vae.parameters())


def test_clipping_between_unscale_and_step(key):
    """The recipe of PyTorch's AMP examples: unscale, clip, step; the clip sees true gradients."""
    torch.manual_seed(0)
    vae = vae_fast.VAE.mlp((6,), 2, (8,))
    optimizer = torch.optim.SGD(vae.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    x = torch.rand(8, 6)
    with torch.autocast("cpu", F16):
        loss = vae(x, key=key).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    scaler.step(optimizer)
    vae.zero_grad()
    torch.manual_seed(0)
    plain = vae_fast.VAE.mlp((6,), 2, (8,))
    plain(x, key=key).loss.backward()
    want = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
    torch.testing.assert_close(norm, want, rtol=5e-3, atol=0)


# ---- the ends of the range ---------------------------------------------------------------------

EXTREMES = [80.0, -80.0]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("scale_dtype", ["same", F32], ids=str)
def test_extreme_posteriors(dtype, scale_dtype, backend, key):
    """σ = e^±40: finite where the truth is, infinite where it overflows, and never NaN."""
    key = key.to(backend)
    s_dtype = dtype if scale_dtype == "same" else F32
    mu = torch.tensor([[0.5, -2.0, 0.0, 1.0, -0.25]] * 2, device=backend).to(dtype)
    s = torch.tensor(EXTREMES, device=backend)[:, None].expand(2, 5).to(s_dtype)
    eps = noise.normal(key, 2, None, (5,)).double()
    for outputs in ((0,), (1,), (2,), (0, 1, 2)):
        leaves = [t.clone().requires_grad_() for t in (mu, s)]
        leaves64 = [t.double().requires_grad_() for t in (mu, s)]
        results = vae_fast.reparameterize(*leaves, key=key)
        true = reference.reparameterize(*leaves64, eps=eps)
        for got, want in zip(results, true):
            assert_rounded(got, want, 1.0 if truncates(backend) else 0.5)
        assert results[0].isinf().any() == (dtype == F16)
        assert results[1].isfinite().all()
        assert results[2].isfinite().all()
        # An infinite z has a finite gradient here: the loss is linear in each result.
        upstream = [torch.full_like(results[i], 0.5) for i in outputs]
        parts, parts64 = [results[i] for i in outputs], [true[i] for i in outputs]
        missing = dict(materialize_grads=True)  # log q does not depend on mu
        grads = torch.autograd.grad(parts, leaves, upstream, **missing)
        upstream = [u.double() for u in upstream]
        truth = torch.autograd.grad(parts64, leaves64, upstream, **missing)
        for got, want in zip(grads, truth):
            assert_rounded(got, want, 1.0 if truncates(backend) else 0.5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("scale_dtype", ["same", F32], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_extreme_likelihoods(dtype, scale_dtype, inplace, reduction, backend):
    """τ = e^±40, residuals of zero among them: the fp64 gradient, rounded to the output's dtype."""
    s_dtype = dtype if scale_dtype == "same" else F32
    x = torch.tensor([[0.5, 1.0, -3.0, 0.0], [0.5, 1.0, -3.0, 0.0], [1.0] * 4], device=backend)
    mean = torch.tensor([[0.5, -1.0, 2.0, 1e-4]] * 2 + [[1.0] * 4], device=backend).to(dtype)
    s = torch.tensor([*EXTREMES, -80.0], device=backend)[:, None].expand(3, 4).to(s_dtype)
    log_q = torch.zeros(3, device=backend)
    leaves = [t.clone().requires_grad_() for t in (mean, s)]
    leaves64 = [t.double().requires_grad_() for t in (mean, s)]
    loss, nll = vae_fast.fused_elbo(
        x, leaves[0] * 1, leaves[1] * 1, log_q, reduction=reduction, inplace=inplace
    )
    true_nll = reference.gaussian_nll(x.double(), *leaves64)
    true = reference.elbo_loss(true_nll, log_q.double(), reduction=reduction)
    assert_rounded(loss, true)
    assert_rounded(nll, true_nll)
    grads = torch.autograd.grad(loss.sum(), leaves)
    truth = torch.autograd.grad(true.sum(), leaves64)
    for got, want in zip(grads, truth):
        assert_rounded(got, want, 1.0 if truncates(backend) else 0.5)
    assert grads[0].isinf().any() == (dtype == F16)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_zero_upstream_gradient_of_an_infinite_one(name, inplace):
    """What takes no part in the loss has no gradient, though its own would overflow."""
    device = _skip_unless_it_runs(name)
    with vae_fast.use_backend(name):
        x, log_q = torch.ones(2, 3, device=device), torch.zeros(2, device=device)
        mean = torch.zeros(2, 3, device=device, dtype=F16).requires_grad_()
        s = torch.tensor([[-80.0], [0.0]], device=device, dtype=F16).expand(2, 3)
        loss, _ = vae_fast.fused_elbo(x, mean * 1, s * 1, log_q, reduction="none", inplace=inplace)
        (grad,) = torch.autograd.grad(loss, mean, torch.tensor([0.0, 1.0], device=device))
    assert torch.equal(grad, torch.tensor([[0.0] * 3, [-1.0] * 3], device=device, dtype=F16))
