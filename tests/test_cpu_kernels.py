"""What only the C++ kernels do: whole-vector conversions, and stores that go past the caches."""

from itertools import permutations

import pytest
import torch

import vae_fast
from vae_fast import reference

pytestmark = pytest.mark.usefixtures("cpp")


HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@HALVES
@pytest.mark.parametrize("shape", [(-1, 1), (256, 256)])
def test_every_half_survives_the_conversions(dtype, shape):
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    mu = patterns.view(dtype)
    # σ = 0: z is μ, widened and narrowed again, whatever ε is.
    rows = mu.view(shape)
    z = vae_fast.reparameterize(rows, torch.full_like(rows, -torch.inf))[0].flatten()
    number = ~torch.isnan(mu)
    assert torch.isnan(z[~number]).all()
    assert torch.equal(z[number].view(torch.int16), patterns[number])


@HALVES
def test_halves_are_rounded_to_nearest_even(dtype):
    # Any numbers at all, and some of one size: differences that are subnormal, normal, halfway
    # between two numbers, and too large.
    words = torch.randint(-(1 << 15), 1 << 15, (2, 300, 1000), dtype=torch.int16).view(dtype)
    words[:, :100] = torch.randn(2, 100, 1000).to(dtype)
    x, mean = torch.where(words.isfinite(), words, 0.0).unbind()
    mean.requires_grad_()
    log = torch.zeros(len(x))
    # At σ = 1 the gradient of the mean is the residual.
    vae_fast.fused_elbo(x, mean, torch.zeros_like(x), log, log, reduction="sum")[0].backward()
    residual = mean.detach().float() - x.float()
    dropped = 16 if dtype == torch.bfloat16 else 13
    half = residual.view(torch.int32) & ((1 << dropped) - 1) == 1 << (dropped - 1)
    assert half.any()
    assert dtype == torch.bfloat16 or (residual.abs() > 65520).any()
    assert dtype == torch.bfloat16 or ((residual.abs() < 6e-5) & (residual != 0)).any()
    assert torch.equal(mean.grad, residual.to(dtype))


# Rows of whole cache lines, which may be streamed, and others; the gradients exceed 6 MiB.
@pytest.mark.parametrize("size", [784, 785])
@pytest.mark.parametrize("num_samples", [1, 2])
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_larger_than_the_caches(size, num_samples, scalar, inplace):
    batch = 2016 // num_samples
    assert num_samples * batch * size * 4 > 6 << 20
    x = torch.randn(batch, size)
    rows = (batch,) if num_samples == 1 else (num_samples, batch)
    log_q, log_p = torch.randn(rows), torch.randn(rows)
    leaves = [torch.randn(num_samples * batch, size)]
    leaves.append(torch.tensor(0.3) if scalar else torch.randn(num_samples * batch, size))
    results = []
    for dtype in (torch.float32, torch.float64):
        mean, s = (t.to(dtype).requires_grad_() for t in leaves)
        args = [t.to(dtype) for t in (log_q, log_p)]
        if dtype == torch.float32:
            loss = vae_fast.fused_elbo(x, mean * 1, s * 1, *args, inplace=inplace)[0]
        else:
            stacked = mean.view(*rows, size), s if scalar else s.view(*rows, size)
            nll = reference.gaussian_nll(x.double(), *stacked)
            loss = reference.elbo_loss(nll, *args)
        results.append([loss.detach(), *torch.autograd.grad(loss, (mean, s))])
    for got, want in zip(*results):
        torch.testing.assert_close(
            got.double(), want, rtol=2e-5, atol=1e-6 * float(want.abs().max())
        )


@pytest.mark.parametrize("what", ["clamp", "soft clamp", "levels", "bf16", "bf16 net", "mask"])
@pytest.mark.parametrize("learned", [False, True])
def test_a_gradient_past_the_caches_has_the_same_bits(what, learned):
    dtype = torch.bfloat16 if "bf16" in what else torch.float32
    batch, few, size = 8192 // dtype.itemsize, 100, 800
    assert few * size * dtype.itemsize < 6 << 20 < batch * size * dtype.itemsize
    assert size * dtype.itemsize % 64 == 0  # rows that do not begin at a vector never go there
    x, mean, s = (torch.randn(batch, size).to(dtype) for _ in range(3))
    if what == "levels":
        x = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    if what == "bf16 net":
        x = torch.randn(batch, size)
    options = {"clamp": (-0.5, 0.5)} if "clamp" in what else {}
    options |= {"clamp_mode": "soft"} if what == "soft clamp" else {}
    mask = torch.rand(batch, size) > 0.5 if what == "mask" else None

    def gradients(rows):
        log = torch.zeros(rows)
        leaves = [mean[:rows].clone().requires_grad_(), s[:rows].clone().requires_grad_(learned)]
        masked = {} if mask is None else {"mask": mask[:rows]}
        arguments = x[:rows], *leaves, log, log
        vae_fast.fused_elbo(*arguments, reduction="sum", **options, **masked)[0].backward()
        return [t.grad[:few] for t in leaves if t.requires_grad]

    for streamed, cached in zip(gradients(batch), gradients(few), strict=True):
        assert torch.equal(streamed, cached)


# Tiles that are part of a row, one row and several; and rows that are worked on in pieces.
@pytest.mark.parametrize("size", [304, 1024, 1504, 3072, 9008])
@pytest.mark.parametrize("inplace", [False, True])
def test_packed_rows_larger_than_the_caches(size, inplace):
    """They do not follow each other, and are fetched ahead."""
    rows = (6 << 20) // (4 * size) + 2
    x, log = torch.randn(rows, size), torch.randn(rows)
    leaf = torch.randn(rows, 2 * size, requires_grad=True)

    def results(mean, scale):
        loss, nll = vae_fast.fused_elbo(x, mean, scale, log, log, inplace=inplace)
        return loss, nll, *torch.autograd.grad(loss, leaf)

    apart = results(*(half.clone() for half in leaf.chunk(2, dim=1)))
    assert all(map(torch.equal, results(leaf * 1, None), apart))


# Rows of several tiles and pieces, whose innermost dimension is short, long and in between.
@pytest.mark.parametrize("event", [(3, 60, 60), (60, 3, 60), (60, 60, 3), (2, 17, 9, 31)])
@pytest.mark.parametrize("what", ["fp32", "bf16", "bf16 net", "levels", "mask"])
def test_operands_of_different_layouts(event, what):
    dtype = torch.bfloat16 if "bf16" in what else torch.float32
    x, mean, s = (torch.randn(3, *event).to(dtype) for _ in range(3))
    if what == "levels":
        x = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    if what == "bf16 net":
        x = torch.randn(3, *event)
    mask = torch.rand(x.shape) > 0.5 if what == "mask" else None
    log = torch.zeros(3)

    def results(x, mean, s, mask):
        leaves = [t.detach().requires_grad_() for t in (mean, s)]
        loss, nll = vae_fast.fused_elbo(x, *leaves, log, log, mask=mask)
        loss.backward()
        return nll, *(t.grad for t in leaves)

    nll, *gradients = results(x, mean, s, mask)
    orders = [(0, *(d + 1 for d in order)) for order in permutations(range(len(event)))]
    for i, order in enumerate(orders):
        others = order, orders[i - 1], orders[i // 2], orders[0]

        def lay_out(t, order):
            back = [order.index(d) for d in range(t.dim())]
            return t.permute(order).contiguous().permute(back)

        tensors = [t if t is None else lay_out(t, o) for t, o in zip((mean, x, s, mask), others)]
        got = results(tensors[1], tensors[0], *tensors[2:])
        torch.testing.assert_close(got[0], nll, rtol=1e-5, atol=0)
        assert all(map(torch.equal, got[1:], gradients))


# Events of several tiles: what repeats does so across their ends, too.
@pytest.mark.parametrize("shape", [(5, 1, 1), (5, 40, 1), (40, 30), (30,), (5, 1, 30)])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_repeats_is_as_its_copies(shape, rows, layout, dtype):
    x, mean = (torch.randn(3, 5, 40, 30).to(dtype, memory_format=layout) for _ in range(2))
    shape = (rows, *(1,) * (3 - len(shape)), *shape)
    s, mask = torch.randn(shape).to(dtype), torch.rand(shape) > 0.4

    def results(s, mask):
        leaf = mean.clone().requires_grad_()
        nll = vae_fast.gaussian_nll(x, leaf, s, mask=mask)
        return nll, *torch.autograd.grad(nll.sum(), leaf)

    nll, g_mean = results(s, mask)
    # An event's scale stays one, for which there are kernels of its own.
    shapes = (rows, *x.shape[1:]), x.shape
    copies = (t.expand(n).contiguous(memory_format=layout) for t, n in zip((s, mask), shapes))
    expected, expected_g_mean = results(*copies)
    torch.testing.assert_close(nll, expected)
    assert torch.equal(g_mean, expected_g_mean)


@pytest.mark.parametrize("batch", [1, 2048])  # the larger one goes past the caches
def test_a_scale_far_beyond_its_bounds_has_no_gradient_however_large_the_residual(batch):
    mean = torch.full((batch, 1024), 1e20, requires_grad=True)
    s = torch.full((batch, 1024), 1e3, requires_grad=True)
    log = torch.zeros(batch)
    x = torch.zeros(batch, 1024)
    soft = {"clamp": (-1.0, 1.0), "clamp_mode": "soft"}
    vae_fast.fused_elbo(x, mean, s, log, log, **soft)[0].backward()
    assert mean.grad.isfinite().all()
    assert (s.grad == 0).all()


@pytest.mark.parametrize("size", [1, 16, 100])
def test_a_gradient_just_below_overflow_is_finite(size):
    mean = torch.zeros(1, size, requires_grad=True)
    x, s = torch.full((1, size), 2**0.69), torch.full((1, size), -127.02 * 0.6931471805599453)
    nll = vae_fast.gaussian_nll(x, mean, s)
    (g,) = torch.autograd.grad(nll.sum(), mean)
    exact = -x.double() * torch.exp(-s.double())
    torch.testing.assert_close(g.double(), exact, rtol=1e-5, atol=0)
    # And the other end: a huge residual over a huge σ.
    far = vae_fast.gaussian_nll(
        torch.full((1, size), 3e38), mean.detach(), torch.full_like(s, 175.0)
    )
    want = 0.5 * (3e38 * torch.exp(torch.tensor(-87.5).double())) ** 2 + 87.5 + 0.9189385332
    torch.testing.assert_close(far.double(), want.expand(1) * size, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1, 16, 100])
def test_a_scale_that_is_known_to_be_moderate_is_exact(size):
    # In a row of moderate scales the exponential is another one than in a row with one that is not.
    s = torch.linspace(-22.0, 22.0, size)
    far = torch.cat([s, torch.tensor([22.5])])
    zeros, key = torch.zeros(1, size), torch.tensor([1, 2], dtype=torch.uint64)
    eps, z = (vae_fast.reparameterize(zeros, t, key=key)[0] for t in (zeros, s[None]))
    torch.testing.assert_close(
        z.double(), torch.exp(0.5 * s.double()) * eps.double(), rtol=5e-7, atol=0
    )

    def gradient(s):
        mean = torch.zeros(1, len(s), requires_grad=True)
        vae_fast.gaussian_nll(torch.ones(1, len(s)), mean, s[None]).sum().backward()
        return mean.grad[0]

    want = -torch.exp(-s.double())
    for got in (gradient(s), gradient(far)[:size]):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1, 16, 100])
def test_scales_around_the_end_of_the_moderate_ones(size):
    """In both passes: rows of one scale each, from where all are moderate to where none is."""
    s = torch.cat([torch.linspace(*ends, 2001) for ends in ((-48.0, -18.0), (18.0, 48.0))])
    rows, key = s[:, None].expand(-1, size).contiguous(), torch.tensor([1, 2], dtype=torch.uint64)
    zeros = torch.zeros_like(rows)
    eps, z = (vae_fast.reparameterize(zeros, t, key=key)[0].double() for t in (zeros, rows))
    torch.testing.assert_close(z, torch.exp(0.5 * rows.double()) * eps, rtol=1e-6, atol=0)

    mean = zeros.clone().requires_grad_()
    vae_fast.gaussian_nll(torch.ones_like(rows), mean, rows).sum().backward()
    torch.testing.assert_close(mean.grad.double(), -torch.exp(-rows.double()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1, 5, 16, 100])
def test_what_comes_of_a_row_does_not_depend_on_the_others(size):
    # One that is far from moderate, among rows that share a tile with it.
    key = torch.tensor([1, 2], dtype=torch.uint64)
    mu, scale, upstream = torch.randn(3, 40, size)
    scale[7] = 60.0

    def passes(first, last):
        m, s = (t[first:last].clone().requires_grad_() for t in (mu, scale))
        z, log_q, log_p = vae_fast.reparameterize(m, s, key=key, first_row=first)
        g = torch.autograd.grad((z * upstream[first:last]).sum() + (log_q - log_p).sum(), (m, s))
        nll = vae_fast.gaussian_nll(upstream[first:last], m, s)
        return (z, log_q, log_p, *g, nll, *torch.autograd.grad(nll.sum(), (m, s)))

    alone = zip(*(passes(i, i + 1) for i in range(40)), strict=True)
    for all_rows, parts in zip(passes(0, 40), alone, strict=True):
        assert torch.equal(all_rows, torch.cat(parts))


def test_gradients_at_the_ends_of_fp32_are_no_nans():
    one = torch.ones(1, 4)
    s = torch.zeros(1, 4, requires_grad=True)
    nll = vae_fast.gaussian_nll(one, one.clone().requires_grad_(), s, param="logstd")
    (g,) = torch.autograd.grad(nll, s, torch.tensor([2e38]))
    assert torch.equal(g, 2e38 * one)
    s = torch.full((1, 4), 1e-40, requires_grad=True)
    nll = vae_fast.gaussian_nll(one, one.clone().requires_grad_(), s, param="std")
    (g,) = torch.autograd.grad(nll.sum(), s)
    assert torch.equal(g, torch.inf * one)  # 1/σ
    z, _, log_p = vae_fast.reparameterize(one, torch.full((1, 4), -torch.inf), param="softplus")
    assert torch.equal(z, one)
    assert log_p.isfinite().all()


@pytest.mark.parametrize("size", [1, 16, 100])
def test_of_the_smallest_residual_nothing_is_lost(size):
    mean = torch.full((1, size), 1e-45, requires_grad=True)
    s = torch.linspace(-60.0, -47.0, size)[None]
    nll = vae_fast.gaussian_nll(torch.zeros(1, size), mean, s, param="logstd")
    (g,) = torch.autograd.grad(nll.sum(), mean)
    exact = mean.detach().double() * torch.exp(-2 * s.double())
    torch.testing.assert_close(g.double(), exact, rtol=2e-5, atol=0)


ENDS = {
    "logvar": [-1000, -176, -172, -87, -20, 0, 20, 87, 172, 1000],
    "logstd": [-500, -88, -86, -40, 0, 40, 86, 88, 500],
    "std": [1e-45, 1e-40, 1e-30, 1e-10, 1, 1e10, 1e30, 3e38],
    "var": [1e-45, 1e-40, 1e-30, 1e-10, 1, 1e10, 1e30, 3e38],
    "softplus": [-1000, -104, -90, -17.5, -16.5, 0, 20, 200, 1e30],
}


@pytest.mark.parametrize("param", ENDS)
def test_a_shared_scale_is_exact_to_the_ends_of_fp32(param):
    """Finite where the exact gradient is, infinite where it is not, and 0 for no residual."""
    s = torch.tensor(ENDS[param])
    residuals = torch.tensor([0, 1e-30, 1e-10, 1, 1e10, 1e25, 3e38])
    x = residuals[:, None].expand(-1, len(s)).contiguous()

    def gradient(dtype):
        mean = torch.zeros(x.shape, dtype=dtype, requires_grad=True)
        nll = vae_fast.gaussian_nll(x.to(dtype), mean, s.to(dtype), param)
        return torch.autograd.grad(nll.sum(), mean)[0]

    got = gradient(torch.float32)
    with vae_fast.use_backend("reference"):
        expected = gradient(torch.float64).float()
    torch.testing.assert_close(got, expected, rtol=5e-6, atol=1e-44)


def test_a_scale_that_is_nan_is_within_every_bound():
    s = torch.zeros(1, 20)
    s[0, 3] = torch.nan
    s.requires_grad_()
    nll = vae_fast.gaussian_nll(torch.zeros(1, 20), torch.zeros(1, 20), s, clamp=(-1.0, 1.0))
    nll.sum().backward()
    assert nll.isnan()
    assert s.grad.isnan().nonzero().tolist() == [[0, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("data", ["the same", "fp32", "levels"])
def test_a_mask_holds_for_every_storage(dtype, data):
    x, mean, s = (torch.randn(5, 100).to(dtype) for _ in range(3))
    if data == "fp32":
        x = torch.randn(5, 100)
    if data == "levels":
        x = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    mask, log = torch.rand(x.shape) > 0.5, torch.zeros(5)
    leaves = [t.requires_grad_() for t in (mean, s)]
    loss, nll = vae_fast.fused_elbo(x, *leaves, log, log, mask=mask)
    loss.backward()
    with vae_fast.use_backend("reference"):
        want = vae_fast.gaussian_nll(x, mean.detach(), s.detach(), mask=mask)
    torch.testing.assert_close(nll, want, rtol=1e-5, atol=1e-5)
    for t in leaves:
        assert torch.equal(t.grad != 0, mask)
