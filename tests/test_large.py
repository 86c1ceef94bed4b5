"""Tensors of more than 2³¹ elements. They take minutes and 10 GB: VAE_FAST_LARGE=1 runs them."""

import os

import pytest
import torch

import vae_fast
from vae_fast import reference

GIB = 1 << 30
ELEMENTS = 2**31
WIDTH = 4096


def memory_free():
    """Bytes that a process may still take, on Linux; 0 where nobody says."""
    try:
        with open("/proc/meminfo") as file:
            facts = dict(line.split(":") for line in file)
        return int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0


pytestmark = [
    pytest.mark.usefixtures("cpp"),
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("VAE_FAST_LARGE") != "1", reason="takes 10 GB: VAE_FAST_LARGE=1 runs it"
    ),
]


@pytest.fixture
def needs():
    """Skips where fewer GiB of memory are free."""

    def skip_unless(gib):
        if memory_free() < gib * GIB:
            pytest.skip(f"needs {gib} GiB of free memory, {memory_free() / GIB:.1f} are")

    return skip_unless


def filled(rows, width=WIDTH):
    """bf16, a pattern that no row shares with another nearby; made piece by piece."""
    t = torch.empty(rows, width, dtype=torch.bfloat16)
    g = torch.Generator().manual_seed(0)
    noise_ = torch.randn(4099, width, generator=g).bfloat16()
    for begin in range(0, rows, 4099):
        piece = t[begin : begin + 4099]
        piece.copy_(noise_[: len(piece)])
    return t


def ends(rows, count=3):
    """The first rows, those around element 2³¹, and the last."""
    middle = ELEMENTS // WIDTH
    return [slice(0, count), slice(middle - count, middle + count), slice(rows - count, rows)]


@pytest.mark.parametrize("levels", [True, False])
def test_likelihood(levels, needs):
    """A bf16 mean of a little more than 2³¹ elements, overwritten by its gradient."""
    needs(10)
    rows = ELEMENTS // WIDTH + 37
    g = torch.Generator().manual_seed(1)
    if levels:
        x = torch.randint(256, (61, WIDTH), generator=g).to(torch.uint8)
        x = x[torch.arange(rows) % 61]
    else:
        x = torch.randn(1, WIDTH, generator=g).bfloat16().expand(rows, WIDTH)
    output = filled(rows).requires_grad_()
    mean = _Computed.apply(output)
    s = torch.tensor(-0.7, dtype=torch.bfloat16, requires_grad=True)
    log = torch.linspace(-1, 1, rows)
    kept = [mean.detach()[part].clone() for part in ends(rows)]
    loss, nll = vae_fast.fused_elbo(x, mean, s, log, None, 0.5, "sum", inplace=True)
    loss.backward()
    gradient = mean.detach()
    for part, before in zip(ends(rows), kept):
        m = before.double().requires_grad_()
        data = x[part] if levels else x[part].double()
        truth = reference.gaussian_nll(data, m, s.detach().double())
        torch.testing.assert_close(nll[part].double(), truth.detach(), rtol=2e-6, atol=1e-2)
        (want,) = torch.autograd.grad(truth.sum(), m)
        torch.testing.assert_close(gradient[part].double(), want, rtol=2**-8, atol=1e-30)
    total = nll.double().sum() + 0.5 * log.double().sum()
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    # ∂s/∂logvar = Σ ½(1 − r²) = Σ nll − D·(½logvar + ½log 2π) and so on: known from the values.
    half_square = nll.double().sum() - rows * WIDTH * (
        0.5 * s.double().item() + reference.HALF_LOG_2PI
    )
    want = 0.5 * rows * WIDTH - half_square.item()
    assert s.grad.item() == pytest.approx(want, rel=2**-7)


class _Computed(torch.autograd.Function):
    """A result of the decoder's in the decoder's own memory: nothing of this size is copied."""

    @staticmethod
    def forward(ctx, t):
        return torch.empty(0, dtype=t.dtype).set_(t.detach())

    @staticmethod
    def backward(ctx, g):
        return None


def test_likelihood_gradients_of_their_own(needs):
    """A shared event's gradient, not in place: one more tensor of that size."""
    needs(12)
    rows = ELEMENTS // WIDTH + 37
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1, WIDTH, generator=g).bfloat16().expand(rows, WIDTH)
    mean = filled(rows).requires_grad_()
    s = torch.randn(WIDTH, generator=g).requires_grad_()
    nll = vae_fast.gaussian_nll(x, mean, s)
    nll.sum().backward()
    for part in ends(rows):
        m, r = (t.detach().double().requires_grad_() for t in (mean[part], s))
        truth = reference.gaussian_nll(x[part].double(), m, r)
        torch.testing.assert_close(nll[part].double(), truth, rtol=1e-5, atol=1e-2)
        (want,) = torch.autograd.grad(truth.sum(), m)
        torch.testing.assert_close(mean.grad[part].double(), want, rtol=2**-8, atol=1e-30)
    # Rows repeat every 4099: all of the sum is known from those.
    m, r = (t.detach().double().requires_grad_() for t in (mean[:4099], s))
    counts = torch.full((4099,), float(rows // 4099)).double()
    counts[: rows % 4099] += 1
    truth = reference.gaussian_nll(x[:4099].double(), m, r)
    (want,) = torch.autograd.grad((truth * counts).sum(), r)
    torch.testing.assert_close(s.grad.double(), want, rtol=1e-4, atol=1e-4 * want.abs().max())


@pytest.mark.parametrize("samples", [None, 3])
def test_latent(samples, needs):
    """A latent of more than 2³¹ elements: in its rows, or by its samples."""
    needs(10)
    k = samples or 1
    rows = ELEMENTS // WIDTH // k + 37
    mu, s = filled(rows), torch.tensor(-1.0, dtype=torch.bfloat16)
    key = torch.tensor([9, 2**63], dtype=torch.uint64)
    first_row = 2**40
    with torch.no_grad():
        z, log_q, log_p = vae_fast.reparameterize(
            mu, s, num_samples=samples, key=key, first_row=first_row
        )
    by_sample = (lambda t, part: t[part]) if samples is None else (lambda t, part: t[:, part])
    for part in (slice(0, 3), slice(rows // 2, rows // 2 + 3), slice(rows - 3, rows)):
        options = (samples, key, None, first_row + part.start)
        want = reference.reparameterize(mu[part], s, "logvar", *options)
        torch.testing.assert_close(by_sample(z, part), want[0], rtol=2**-7, atol=2**-7)
        for got, t in zip((log_q, log_p), want[1:]):
            torch.testing.assert_close(by_sample(got, part), t, rtol=1e-5, atol=1e-2)


def test_latent_gradient(needs):
    needs(12)
    rows = ELEMENTS // WIDTH + 5
    mu = filled(rows).requires_grad_()
    s = torch.tensor(-1.0, dtype=torch.bfloat16)
    key = torch.tensor([9, 1], dtype=torch.uint64)
    _, _, log_p = vae_fast.reparameterize(mu, s, key=key)
    log_p.sum().backward()
    for part in ends(rows):
        m = mu.detach()[part].clone().requires_grad_()
        _, _, want = reference.reparameterize(m, s, key=key, first_row=part.start)
        (g,) = torch.autograd.grad(want.sum(), m)
        torch.testing.assert_close(mu.grad[part], g, rtol=2**-7, atol=2**-7)
