"""The likelihood pass beyond the plain Gaussian: families, shared scales, stored levels; and KL and
importance weights. Accuracy in every dtype, extremes, determinism and memory, on every backend.
"""

import math

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from accuracy import HALF_LOG_2PI, SIGMA, assert_accurate, is_interpreted
from test_passes import DTYPES, latent_views, raw_scale, results_and_gradients

import vae_fast
from vae_fast import noise, ops, reference

FAMILIES = ("gaussian", "laplace", "bernoulli", "logistic", "student_t")


def eager_element(family, x, m, tau, df=4.0):
    """−log p as one writes it by hand, in the dtype of the inputs."""
    if family == "bernoulli":
        return F.binary_cross_entropy_with_logits(m, x, reduction="none")
    r = (x - m) / tau
    if family == "gaussian":
        return 0.5 * r.square() + torch.log(tau) + HALF_LOG_2PI
    if family == "laplace":
        return r.abs() + torch.log(tau) + math.log(2.0)
    if family == "student_t":
        constant = math.lgamma(df / 2) - math.lgamma((df + 1) / 2) + 0.5 * math.log(math.pi * df)
        return 0.5 * (df + 1) * torch.log1p(r.square() / df) + torch.log(tau) + constant
    half = 0.5 / 255 / tau
    above = torch.where(x > 254.5 / 255, 1.0, torch.sigmoid(r + half))
    below = torch.where(x < 0.5 / 255, 0.0, torch.sigmoid(r - half))
    return -torch.log(above - below)


def check_family(device, family, batch, event, dtype, param="logvar", clamp=None, mode="hard",
                 scale_shape=None, masked=False, num_samples=None):  # fmt: skip
    shape = (batch, *event) if num_samples is None else (num_samples, batch, *event)
    x = (torch.randint(256, (batch, *event)).double() / 255).to(device, dtype)
    mean = torch.rand(shape).to(device, dtype)
    s = raw_scale(param, shape if scale_shape is None else scale_shape, dtype, device)
    mask = masked if isinstance(masked, torch.Tensor) else None
    if masked is True:
        mask = (torch.rand(batch, *event) > 0.3).to(device)
    upstream = [torch.randn(shape[: len(shape) - len(event)]).to(device).double()]
    levels = family == "logistic"  # x lies on levels, from which it must not be moved by rounding
    inputs = [mean] if family == "bernoulli" else [mean, s]
    inputs = inputs if levels else [x, *inputs]

    def fused(*a, nll=vae_fast.likelihood_nll):
        data, *rest = (x.to(a[0].dtype), *a) if levels else a
        options = {"param": param, "clamp": clamp, "clamp_mode": mode, "mask": mask}
        return [nll(data, *rest, likelihood=family, **options)]

    def eager(*a):
        data, m, *raw = (x, *a) if levels else a
        if levels and dtype.itemsize == 2:  # where the difference of two masses is often zero
            data, m, *raw = (t.float() for t in (data, m, *raw))
        raw = raw[0] if raw else None
        if raw is not None and clamp is not None:
            raw = reference.clamp_scale(raw, clamp, mode)
        value = eager_element(family, data, m, None if raw is None else SIGMA[param](raw))
        if mask is not None:
            value = torch.where(mask, value, 0.0)
        return [value.sum(tuple(range(value.dim() - len(event), value.dim())))]

    truth = results_and_gradients(
        lambda *a: fused(*a, nll=reference.likelihood_nll), [t.double() for t in inputs], upstream
    )
    ours = results_and_gradients(fused, inputs, upstream)
    theirs = results_and_gradients(eager, inputs, upstream)
    interpreted = is_interpreted(inputs[0].device) and dtype == torch.bfloat16
    assert_accurate(
        ours, theirs, truth, dtype, truncates=interpreted or (levels and dtype.itemsize == 2)
    )
    for g, t in zip(ours[1:], inputs, strict=True):
        assert (g.shape, g.dtype) == (t.shape, t.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, dtype, fused):
    check_family(fused, family, 5, (37,), dtype)


@pytest.mark.parametrize(
    ("scale_shape", "dtype"),
    [
        ((4, 19), torch.float32),
        ((4, 19), torch.float64),
        ((), torch.float64),
        ((4, 1), torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("param", ops.PARAMS)
@pytest.mark.parametrize("family", ["gaussian", "laplace", "logistic", "student_t"])
def test_families_params_and_clamps(family, param, scale_shape, dtype, fused):
    for clamp, mode in ((None, "hard"), ((0.35, 0.9), "hard"), ((0.3, 1.2), "soft")):
        case = (fused, family, 4, (19,), dtype, param, clamp, mode, scale_shape)
        check_family(*case)
        check_family(*case, masked=True)


MASKS = {
    "transposed": lambda m: m.t().contiguous().t(),
    "every other": lambda m: torch.stack((m, ~m), 2).flatten(1)[:, ::2],
    "in the middle": lambda m: torch.cat((~m, m, ~m), 1)[:, m.shape[1] : -m.shape[1]],
    "one row": lambda m: m[0],
    "one column": lambda m: m[:, :1],
    "one of 16": lambda m: torch.stack([m, *[~m] * 15], 2)[..., 0],
    "one for all": lambda m: m[0, 0],
    "bytes other than one": lambda m: (m.byte() * 6).view(torch.bool),
}


@pytest.mark.parametrize("size", [64, 67])  # of whole vectors, and not
@pytest.mark.parametrize("layout", MASKS)
@pytest.mark.parametrize("family", ["gaussian", "bernoulli"])
def test_masks_of_any_layout(family, layout, size, fused):
    mask = MASKS[layout]((torch.rand(4, size) > 0.4).to(fused))
    check_family(fused, family, 4, (size,), torch.float32, masked=mask)


def test_levels_that_lie_apart(fused):
    """One channel of sixteen, say."""
    x = torch.randint(256, (4, 64, 16), dtype=torch.uint8, device=fused)[..., 3]
    mean, scale = torch.randn(2, 4, 64, device=fused).requires_grad_()
    got, want = (vae_fast.gaussian_nll(t, mean, scale) for t in (x, x.contiguous()))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0.0)
    ours, theirs = (torch.autograd.grad(nll.sum(), (mean, scale)) for nll in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


# Below a vector, ragged, several tiles, several pieces of a row.
@pytest.mark.parametrize("size", [1, 3, 63, 784, 4097, 20011])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_sizes(family, size, fused):
    if size > 5000 and family not in ("gaussian", "bernoulli"):
        size = 9001
    check_family(fused, family, 2, (size,), torch.float32, masked=size == 63)


@pytest.mark.parametrize(
    "options",
    [
        {"clamp": (-0.5, 0.7)},
        {"clamp": (-0.5, 0.7), "mode": "soft", "masked": True},
        {"scale_shape": (2064,)},
        {"scale_shape": (260, 1)},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["gaussian", "laplace", "logistic"])
def test_gradients_larger_than_the_caches(family, options):
    """Which the C++ kernels write past them, from a tile where the scale was prepared."""
    check_family(torch.device("cpu"), family, 260, (2064,), torch.float32, **options)


SHARED = {
    "one": (1,),
    "channel": (3, 1, 1),
    "feature": (3, 5, 4),
    "row of the image": (4,),
    "batch row": (1, 3, 5, 4),
    "row": (70, 1, 1, 1),
    "row and channel": (70, 3, 1, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHARED)
def test_shared_scales(name, dtype, fused):
    """More rows than one block of them; the gradient has the scale's own shape."""
    rows = 20 if is_interpreted(fused) else 70
    shape = tuple(rows if n == 70 else n for n in SHARED[name])
    check_family(fused, "gaussian", rows, (3, 5, 4), dtype, scale_shape=shape)
    if dtype == torch.float32:
        check_family(fused, "gaussian", rows, (3, 5, 4), dtype, scale_shape=shape, masked=True)
        check_family(fused, "student_t", rows, (3, 5, 4), dtype, scale_shape=shape)


@pytest.mark.parametrize(
    "shape", [(7,), (1,), (5, 7), (4, 5, 1), (4, 1, 1), (1, 5, 1), (1, 1, 7), (4, 1, 7)], ids=str
)
def test_shared_scales_of_samples(shape, fused):
    check_family(fused, "gaussian", 5, (7,), torch.float64, scale_shape=shape, num_samples=4)


@pytest.mark.parametrize("size", [3, 1025, 9001])
def test_shared_scale_sizes(size, fused):
    """Ragged, several tiles, several pieces; more rows than a block's."""
    interpreted = is_interpreted(fused)
    rows = 9 if interpreted else 333
    check_family(fused, "gaussian", rows, (size,), torch.float32, scale_shape=(size,))
    check_family(fused, "gaussian", rows, (size,), torch.float32, scale_shape=(rows, 1))


def test_shared_scales_of_strided_data(fused):
    base, views = latent_views()
    x, base = torch.randn(base.shape).to(fused), base.to(fused)
    for shape in ((2, 1, 1), (2, 4, 3), (6, 1, 1, 1)):
        s = torch.randn(shape).to(fused).requires_grad_()
        expected = None
        for view in (base, *(v.to(fused) for v in views.values())):
            mean = view.detach().requires_grad_()
            nll = vae_fast.gaussian_nll(x, mean, s)
            got = [nll, *torch.autograd.grad(nll.sum(), (mean, s))]
            expected = got if expected is None else expected
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_data_get_a_gradient_beside_packed_samples(layout, fused):
    x = torch.randn(4, 3, 2, 2, device=fused)
    mean = torch.randn(12, 6, 2, 2, device=fused)
    if layout == "channels_last":
        mean = mean.contiguous(memory_format=torch.channels_last)
    log_q = torch.randn(3, 4, device=fused)

    def gradients():
        leaves = [x.clone().requires_grad_(), mean.clone().requires_grad_()]
        loss, _ = vae_fast.fused_elbo(*leaves, None, log_q)
        return torch.autograd.grad(loss, leaves)

    ours = gradients()
    with vae_fast.use_backend("reference"):
        theirs = gradients()
    torch.testing.assert_close(ours, theirs)


def test_shared_gradient_does_not_depend_on_the_threads(fused):
    if is_interpreted(fused):
        pytest.skip("the interpreter has one thread")
    x, mean = (torch.randn(300, 1500, device=fused) for _ in range(2))
    scales = [torch.randn(shape, device=fused) for shape in ((1500,), (300, 1), ())]

    def run():
        gradients = []
        for s in scales:
            s = s.clone().requires_grad_()
            gradients += torch.autograd.grad(vae_fast.gaussian_nll(x, mean, s).sum(), s)
        return gradients

    first, threads = run(), torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(), (600,), (256, 1)], ids=str)
def test_shared_scales_make_nothing_of_the_datas_size(shape, cpp, key):
    """Only the mean's gradient is of that size, whatever shares the scale."""
    x = torch.randint(256, (256, 600), dtype=torch.uint8)
    mean = torch.randn(256, 600, requires_grad=True)
    s = torch.zeros(shape, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        vae_fast.likelihood_nll(x, mean, s, dequantize=True, key=key).sum().backward()
    events = profile.profiler.kineto_results.events()
    sizes = [e.nbytes() for e in events if e.name() == "[memory]"]
    assert [n for n in sizes if n > mean.nbytes / 4] == [mean.nbytes]


# ---- extremes --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["laplace", "student_t", "logistic"])
@pytest.mark.parametrize("param", ["logstd", "std"])
def test_extremes_are_finite_where_the_truth_is(param, family, backend):
    """Residuals and scales far beyond what their quotient's square could hold, or itself."""
    r = [0.0, 1e-20, 1e-3, 1.0, 30.0, 1e4, 1e12]
    log_tau = [-87.0, -60.0, -20.0, -3.0, 0.0, 3.0, 20.0, 60.0]
    log_tau += [-95.0] * (param == "logstd")  # not a normal number itself
    x = torch.tensor([[a] for a in r for _ in log_tau], device=backend)
    s = torch.tensor([[b] for _ in r for b in log_tau], device=backend)
    s = s if param == "logstd" else s.exp()
    mean = torch.zeros_like(x)
    if family == "logistic":
        x = x / 1e3
        level = x.clamp(max=1.0)  # the first and the last, and between
        other = level.clone()
        other[::3], other[1::3] = 0.5, 1e3 * (2.0 * level[1::3] - 1.0)
        x, mean, s = (torch.cat(t) for t in ((x.clamp(max=0.9), level), (mean, other), (s, s)))
    mean, s = mean.requires_grad_(), s.requires_grad_()
    nll = vae_fast.likelihood_nll(x, mean, s, family, param)
    got = [nll, *torch.autograd.grad(nll.sum(), (mean, s))]
    m, t = mean.detach().double().requires_grad_(), s.detach().double().requires_grad_()
    truth = reference.likelihood_nll(x.double(), m, t, family, param)
    want = [truth, *torch.autograd.grad(truth.sum(), (m, t))]
    for g, w in zip(got, want, strict=True):
        # The reference adds two halves, of twice the size on their way.
        fits = w.abs() < (
            1e38 if vae_fast.backends.backend_for(x.device.type) == "reference" else 3e38
        )
        assert fits.sum() > 30
        torch.testing.assert_close(g.double()[fits], w[fits], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gaussian", "squared_error"])
def test_half_a_square_is_finite_where_the_square_is_not(family, backend):
    x = torch.zeros(2, 1, device=backend)
    mean = torch.tensor([[2e19], [1.0]], device=backend)
    scale = None if family == "squared_error" else torch.zeros((), device=backend)
    nll = vae_fast.likelihood_nll(x, mean, scale, family)
    constant = 0.0 if scale is None else 0.5 * math.log(2 * math.pi)
    want = torch.tensor([2e38, 0.5 + constant], device=backend)
    torch.testing.assert_close(nll, want)


def test_logistic_is_a_distribution(fused):
    """The masses of the 256 levels add up to one, at any scale."""
    x = torch.arange(256, dtype=torch.uint8, device=fused)[:, None]
    mean = torch.full((256, 1), 0.3011, device=fused)
    interpreted = is_interpreted(fused)
    for log_tau in (-2.0,) if interpreted else (-9.0, -5.0, -2.0, 0.0, 4.0, 30.0):
        nll = vae_fast.likelihood_nll(x, mean, log_tau, "logistic", "logstd")
        assert torch.exp(-nll).sum().item() == pytest.approx(1.0, abs=2e-5)
    centred = vae_fast.likelihood_nll(
        x, torch.zeros_like(mean), -3.0, "logistic", "logstd", x_scale=(2 / 255, -1.0)
    )
    assert torch.exp(-centred).sum().item() == pytest.approx(1.0, abs=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_values_stay_in_their_row(bad, family, fused):
    x = torch.rand(6, 9, device=fused)
    for target in range(3 if family != "bernoulli" else 2):
        inputs = [x.clone(), torch.rand(6, 9, device=fused), torch.rand(6, 9, device=fused)]
        inputs[target][3, 4] = bad
        leaves = [t.requires_grad_() for t in inputs[: 2 if family == "bernoulli" else 3]]
        nll = vae_fast.likelihood_nll(*leaves, likelihood=family)
        gradients = torch.autograd.grad(nll.sum(), leaves)
        clean = torch.arange(6) != 3
        for t in (nll, *gradients):
            assert torch.all(torch.isfinite(t[clean]))
        if math.isnan(bad):
            assert torch.isnan(nll[3])
            assert torch.isnan(gradients[1][3, 4])
    # A value that the rows share reaches them all.
    shared = torch.tensor([0.0, bad, 0.0], device=fused)
    if math.isnan(bad) and family != "bernoulli":
        nll = vae_fast.likelihood_nll(x[:, :3], x[:, :3], shared, family)
        assert torch.all(torch.isnan(nll))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [None, (), (11,), (6, 1)], ids=str)
def test_mask_hides_nan(family, shape, fused):
    if family == "bernoulli" and shape is not None:
        shape = None
    mask = torch.rand(6, 11, device=fused) > 0.5
    mask[2] = False
    x = torch.rand(6, 11, device=fused).masked_fill(~mask, torch.nan)
    mean = torch.randn_like(x).masked_fill(~mask, torch.inf).requires_grad_()
    inputs = [mean]
    if family != "bernoulli":
        s = torch.randn((6, 11) if shape is None else shape, device=fused)
        s = s.masked_fill(~mask, torch.nan) if shape is None else s
        inputs.append(s.requires_grad_())
    nll = vae_fast.likelihood_nll(x, *inputs, likelihood=family, mask=mask)
    assert torch.all(torch.isfinite(nll))
    assert nll[2] == 0
    gradients = torch.autograd.grad(nll.sum(), inputs)
    assert torch.all(gradients[0][~mask] == 0)
    assert all(torch.all(torch.isfinite(g)) for g in gradients)


@pytest.mark.parametrize("size", [5.0, 10.0, 20.0, 60.0])
def test_bernoulli_is_exact_where_it_is_certain(size, backend):
    """And right: nothing cancels."""
    m = torch.cat([torch.linspace(size, size + 1, 50), -torch.linspace(size, size + 1, 50)])[None]
    m = m.to(backend)
    x = (m > 0).float()
    for rows, data in ((m, x), (m[:, :50], x[:, :50]), (m[:, 50:], x[:, 50:])):
        exact = torch.log1p(torch.exp(-rows.double().abs())).sum(1)
        nll = vae_fast.likelihood_nll(data, rows, likelihood="bernoulli")
        torch.testing.assert_close(nll.double(), exact, rtol=1e-6, atol=0.0)
        wrong = vae_fast.likelihood_nll(1.0 - data, rows, likelihood="bernoulli")
        torch.testing.assert_close(wrong.double(), exact + rows.double().abs().sum(1))


@pytest.mark.parametrize("reach", [1.0, 30.0, 1000.0])
def test_soft_clamp_is_exact_in_the_middle_of_its_range(reach, fused):
    """tanh of next to nothing, too."""
    s = torch.linspace(-3.0, 3.0, 1201, device=fused)[:, None]
    x, zero = torch.ones_like(s), torch.zeros_like(s)
    bounds = {"clamp": (-reach, reach), "clamp_mode": "soft"}

    def gradients(x, zero, s):
        s = s.detach().requires_grad_()
        nll = vae_fast.gaussian_nll(x, zero, s, **bounds)
        _, log_q, _ = vae_fast.reparameterize(
            zero, s, key=torch.tensor([1, 2], dtype=torch.uint64, device=s.device), **bounds
        )
        return torch.autograd.grad((nll + log_q).sum(), s)[0]

    with vae_fast.use_backend("reference"):
        exact = gradients(x.double(), zero.double(), s.double())
    got = gradients(x, zero, s)
    # A GPU's approximate exponentials and roots give the gradient of log τ to 2.6e-6.
    relative = 3e-6 if s.is_cuda else 1e-6
    atol = relative * exact.abs().max().item()
    torch.testing.assert_close(got.double(), exact, rtol=0.0, atol=atol)


@pytest.mark.parametrize("family", ["gaussian", "laplace", "logistic", "student_t"])
@pytest.mark.parametrize(("param", "bad"), [("std", 0.0), ("var", 0.0), ("softplus", math.nan)])
@pytest.mark.parametrize("size", [11, 70_001])
def test_mask_hides_scales_of_no_meaning(size, param, bad, family, fused):
    """A padded scale of zero, say, whose logarithm has an infinite slope."""
    if size > 11 and is_interpreted(fused):
        size = 300
    for clamp, mode in ((None, "hard"), ((0.1, 2.0), "soft")):
        mask = torch.rand(6, size, device=fused) > 0.5
        mask[2], mask[:, 3] = False, False
        x, mean = torch.rand(2, 6, size, device=fused).unbind()
        full = (torch.rand(6, size, device=fused) + 0.5).masked_fill(~mask, bad)
        row = torch.rand(6, 1, device=fused) + 0.5
        row[2] = bad
        event = torch.rand(size, device=fused) + 0.5
        event[3] = bad
        for s in (full, row, event):
            s.requires_grad_()
            nll = vae_fast.likelihood_nll(x, mean, s, family, param, clamp, mode, mask)
            (g,) = torch.autograd.grad(nll.sum(), s)
            assert torch.isfinite(nll).all()
            assert torch.isfinite(g).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_nan_of_either_sign_shows(family, fused):
    """A NaN that arithmetic makes has its sign bit set on x86."""
    for bits in (0x7FC00000, 0xFFC00000 - 2**32):
        nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32).to(fused)
        for target in (0, 1):
            inputs = [torch.rand(3, 20, device=fused) for _ in range(3)]
            inputs[target][1, 4] = nan
            leaves = [t.requires_grad_() for t in inputs[: 2 if family == "bernoulli" else 3]]
            nll = vae_fast.likelihood_nll(*leaves, likelihood=family)
            assert torch.isnan(nll).tolist() == [False, True, False]
            gradients = torch.autograd.grad(nll.sum(), leaves)
            for g in gradients[1:] if family != "bernoulli" else gradients[1:2]:
                assert torch.isnan(g).nonzero().tolist() == [[1, 4]]


def test_student_t_of_few_degrees_of_freedom(fused):
    x = torch.tensor([[1e-3], [1.0], [30.0], [1e10], [1e20]], device=fused)
    for df in (1e-10, 1e-8, 1e-3, 1e6):
        s = torch.zeros(5, 1, device=fused, requires_grad=True)
        nll = vae_fast.likelihood_nll(x, torch.zeros_like(x), s, "student_t", df=df)
        r = x.double()
        truth = reference.likelihood_nll(r, torch.zeros_like(r), 0.0 * r, "student_t", df=df)
        torch.testing.assert_close(nll.double(), truth, rtol=2e-5, atol=1e-5)
        (g,) = torch.autograd.grad(nll.sum(), s)
        want = 0.5 * (1.0 - r * r) / (1.0 + r * r / df)
        torch.testing.assert_close(g.double(), want, rtol=1e-5, atol=1e-6 * min(df, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_student_t_far_out(dtype, backend):
    """Of as many degrees of freedom as there may be, r²/ν is nothing beside 1 for a huge r, too."""
    df, s = 1e30, torch.zeros(5, 1, dtype=dtype, device=backend, requires_grad=True)
    x = torch.tensor([[1e10], [1e14], [1.5e15], [1e18], [1e34]], dtype=dtype, device=backend)
    mean = torch.zeros_like(x, requires_grad=True)
    nll = vae_fast.likelihood_nll(x, mean, s, "student_t", df=df)
    got = nll, *torch.autograd.grad(nll.sum(), (mean, s))
    r = x.detach().double()
    square = r * r / df
    assert square.max() > 1e30 > 1e-8 > square.min()
    want = 0.5 * (df + 1.0) * square.log1p(), -(df + 1.0) / df * r / (1.0 + square)
    want = want[0][:, 0], want[1], 0.5 * (1.0 - (df + 1.0) * square / (1.0 + square))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_student_t_of_many_degrees_of_freedom_is_a_gaussian(dtype, backend):
    x = torch.linspace(-3, 3, 7, dtype=dtype, device=backend)[:, None]
    mean, s = torch.zeros_like(x), torch.full_like(x, 0.3)
    gaussian = vae_fast.gaussian_nll(x, mean, s)
    for df in (1e8, 1e12, 1e16, 1e30):
        got = vae_fast.likelihood_nll(x, mean, s, "student_t", df=df)
        tolerance = 1e-6 if dtype == torch.float32 else max(1e-12, 100 / df)
        torch.testing.assert_close(got, gaussian, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("df", [80.0, 100.0, 100.1, 300.0, 5000.0])
def test_student_t_constant(df, backend):
    """Where either way to it is exact."""
    x = torch.zeros(1, 1, dtype=torch.float64, device=backend)
    got = vae_fast.likelihood_nll(x, x, 0.0, "student_t", df=df).item()
    want = math.lgamma(df / 2) - math.lgamma((df + 1) / 2) + 0.5 * math.log(math.pi * df)
    assert got == pytest.approx(want, rel=1e-15, abs=4e-16 * math.lgamma(df / 2))


def test_optimal_variance_of_a_perfect_reconstruction(backend):
    x = torch.rand(4, 6, device=backend)
    mean = x.clone().requires_grad_()
    nll = vae_fast.optimal_gaussian_nll(x, mean, clamp=(-10.0, 10.0))
    torch.testing.assert_close(nll, torch.full_like(nll, 6 * (-5.0 + HALF_LOG_2PI)))
    (g,) = torch.autograd.grad(nll.sum(), mean)
    assert torch.all(g == 0)
    assert torch.all(torch.isfinite(vae_fast.optimal_gaussian_nll(x[:0], mean[:0])))


# ---- stored levels and their noise -------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 5, 784, 4099])
def test_levels_are_what_their_floats_are(size, dtype, fused, key):
    """uint8 data, with and without noise, against the same values made beforehand in fp64."""
    key, first_row = key.to(fused), 3
    x = torch.randint(256, (3, size), dtype=torch.uint8, device=fused)
    mean = torch.randn(3, size).to(fused, dtype).requires_grad_()
    s = torch.randn(3, size).to(fused, dtype).requires_grad_()
    u = noise.uniform(key, 3, (size,), first_row).double()
    for dequantize in (False, True):
        nll = vae_fast.likelihood_nll(
            *(x, mean, s),
            x_scale=(2 / 255, -1.0),
            dequantize=dequantize,
            key=key,
            first_row=first_row,
        )
        floats = (x + u if dequantize else x).double() * (2 / 255) - 1.0
        m, t = (v.detach().double().requires_grad_() for v in (mean, s))
        truth = reference.gaussian_nll(floats, m, t)
        got = [nll, *torch.autograd.grad(nll.sum(), (mean, s))]
        want = [truth, *torch.autograd.grad(truth.sum(), (m, t))]
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 1e-2)
        for g, w in zip(got, want, strict=True):
            # The noise is fp32, in fp64 as well, but for the rounding of its multiplication.
            assert (g.double() - w).abs().max() <= tolerance * max(1.0, w.abs().max())


@pytest.mark.parametrize("dequantize", [False, True])
def test_levels_with_strides(dequantize, fused, key):
    base = torch.randint(256, (6, 2, 4, 3), dtype=torch.uint8, device=fused)
    mean = torch.randn(12, 2, 4, 3, device=fused)
    options = {"dequantize": dequantize, "key": key.to(fused) if dequantize else None}
    rows = torch.zeros(2, 6, device=fused)

    def run(x, mean):
        mean = mean.detach().requires_grad_()
        loss, nll = vae_fast.fused_elbo(x, mean, 0.3, rows, rows, **options)
        return nll, torch.autograd.grad(loss, mean)[0]

    expected = run(base, mean)
    views = (
        base.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        torch.stack([base, base], -1)[..., 0],
        base.flip(0).contiguous().flip(0),
        base.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    )
    for view in views:
        last = mean.to(memory_format=torch.channels_last)
        for got in (run(view, mean), run(view, last)):
            for g, w in zip(got, expected, strict=True):
                torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


def test_uniform_noise(key):
    u = noise.uniform(key, 1000, (1001,))
    assert u.dtype == torch.float32
    assert 0.0 < u.min() < 1e-5
    assert 1.0 - 1e-5 < u.max() <= 1.0
    # Kolmogorov-Smirnov at a level of 1e-6 over 10⁶ draws, and no correlation of neighbours.
    ordered = u.flatten().double().sort().values
    n = len(ordered)
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert (ordered - steps).abs().max() < 2.7 / n**0.5
    for a, b in ((u[:, :-1], u[:, 1:]), (u[:-1], u[1:])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 5 / n**0.5
    # Rows of a split batch are the whole batch's, and nothing is ε's.
    assert torch.equal(noise.uniform(key, 10, (1001,), first_row=500), u[500:510])
    words = noise.philox(key.view(torch.int64)[0], key.view(torch.int64)[1] + torch.arange(251))
    epsilon = noise._uniform(torch.stack(words, -1).flatten()[:1001])
    assert abs(torch.corrcoef(torch.stack([epsilon, u[0]]))[0, 1]) < 0.15
    assert not torch.isin(epsilon, u[0]).any()


def test_a_fresh_key_is_drawn_for_every_call(backend):
    x = torch.randint(256, (4, 30), dtype=torch.uint8, device=backend)
    mean = torch.zeros(4, 30, device=backend)
    first, second = (vae_fast.likelihood_nll(x, mean, -8.0, dequantize=True) for _ in range(2))
    assert torch.all(first != second)


# ---- the latent pass's options -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("param", ops.PARAMS)
def test_path_gradient_and_soft_clamp(param, dtype, fused, key):
    shape, key, clamp = (5, 3, 7), key.to(fused), (0.3, 1.2)
    inputs = [torch.randn(shape).to(fused, dtype), raw_scale(param, shape, dtype, fused)]
    eps = noise.normal(key, 5, 2, shape[1:], dtype=dtype)
    upstream = [torch.randn(2, *shape), torch.randn(2, 5), torch.randn(2, 5)]
    upstream = [u.to(fused, dtype).double() for u in upstream]

    def eager(mu, s):
        middle, reach = 0.75, 0.45
        sigma = SIGMA[param](middle + reach * torch.tanh((s - middle) / reach))
        z = mu + sigma * eps.to(mu.dtype)
        r = (z - mu.detach()) / sigma.detach()
        log_q = -(0.5 * r.square() + torch.log(sigma.detach()) + HALF_LOG_2PI).sum((2, 3))
        return z, log_q, -(0.5 * z.square() + HALF_LOG_2PI).sum((2, 3))

    def ours(mu, s):
        return vae_fast.reparameterize(
            mu, s, param, 2, key, clamp=clamp, clamp_mode="soft", path_gradient=True
        )

    assert_accurate(
        results_and_gradients(ours, inputs, upstream),
        results_and_gradients(eager, inputs, upstream),
        results_and_gradients(eager, [t.double() for t in inputs], upstream),
        dtype,
        is_interpreted(fused) and dtype == torch.bfloat16,
    )


# ---- KL ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("param", ops.PARAMS)
@pytest.mark.parametrize("with_prior", [False, True])
def test_kl(with_prior, param, dtype, fused):
    shape = (5, 3, 7)
    prior_param = ops.PARAMS[(ops.PARAMS.index(param) + 1) % len(ops.PARAMS)]
    inputs = [torch.randn(shape).to(fused, dtype), raw_scale(param, shape, dtype, fused)]
    if with_prior:
        inputs += [torch.randn(shape).to(fused, dtype), raw_scale(prior_param, shape, dtype, fused)]

    def eager(mu, s, prior_mu=None, prior_s=None):
        sigma = SIGMA[param](s)
        if prior_mu is None:
            return [(0.5 * (mu.square() + sigma.square() - 1) - sigma.log()).sum((1, 2))]
        tau = SIGMA[prior_param](prior_s)
        square = ((mu - prior_mu) / tau).square() + (sigma / tau).square()
        return [(0.5 * (square - 1) - (sigma / tau).log()).sum((1, 2))]

    def ours(mu, s, *prior, kl=vae_fast.gaussian_kl):
        return [kl(mu, s, prior or None, param, prior_param)]

    upstream = [torch.randn(5).to(fused).double()]
    assert_accurate(
        results_and_gradients(ours, inputs, upstream),
        results_and_gradients(eager, inputs, upstream),
        results_and_gradients(eager, [t.double() for t in inputs], upstream),
        dtype,
        is_interpreted(fused) and dtype == torch.bfloat16,
    )


@pytest.mark.parametrize("shape", [(), (7,), (3, 1), (3, 7), (5, 1, 1), (5, 3, 7)], ids=str)
def test_kl_broadcasts(shape, backend):
    """All four tensors; their gradients come back in their own shapes."""
    leaf = lambda *s: torch.rand(s, dtype=torch.float64, device=backend).requires_grad_()  # noqa: E731
    leaves = [leaf(5, 3, 7), leaf(*shape), leaf(*shape), leaf(*shape)]
    got = vae_fast.gaussian_kl(leaves[0], leaves[1], leaves[2:], "std", "var")
    q = torch.distributions.Normal(leaves[0], leaves[1])
    p = torch.distributions.Normal(leaves[2], leaves[3].sqrt())
    want = torch.distributions.kl_divergence(q, p).sum((1, 2))
    torch.testing.assert_close(got, want)
    pairs = zip(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True
    )
    for (g, w), t in zip(pairs, leaves, strict=True):
        assert g.shape == t.shape
        torch.testing.assert_close(g, w)


LAYOUTS = {
    "short rows": lambda: torch.randn(3000, 3),
    "rows of a vector": lambda: torch.randn(70, 16),
    "rows and a bit": lambda: torch.randn(70, 17),
    "a long row": lambda: torch.randn(2, 70_001),  # in chunks
    "every other": lambda: torch.randn(70, 34)[:, ::2],
    "rows apart": lambda: torch.randn(70, 40)[:, :17],
    "columns": lambda: torch.randn(2_100, 70).t(),  # in chunks
    "more columns than at once": lambda: torch.randn(90, 600).t(),
    "a few columns": lambda: torch.randn(2_100, 3).t(),
    "columns apart": lambda: torch.randn(500, 90)[:, 5:75].t(),
    "channels last": lambda: torch.randn(30, 5, 7, 3).permute(0, 3, 1, 2),
    "turned": lambda: torch.randn(30, 7, 5, 3).permute(2, 3, 1, 0),
}


@pytest.mark.parametrize("fused", ["cpp"], indirect=True)
@pytest.mark.parametrize("other", ["alike", "contiguous", "shared"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_kl_of_every_layout(layout, other, dtype, fused):
    """Rows are grouped, cut, or read as columns: each has its own sum and its own gradient."""
    torch.manual_seed(1)

    def like(t):
        if other == "shared":
            return torch.randn_like(t[:1].contiguous()).expand(t.shape)
        return torch.randn_like(t) if other == "alike" else torch.randn(t.shape)

    mu = LAYOUTS[layout]()
    inputs = [t.to(dtype) for t in (mu, like(mu), torch.randn_like(mu), like(mu))]
    dims = tuple(range(1, mu.dim()))

    def eager(mu, s, prior_mu, prior_s):
        ratio = 2 * (s - prior_s)
        square = ((mu - prior_mu) / prior_s.exp()).square()
        return [(0.5 * (torch.expm1(ratio) - ratio + square)).sum(dims)]

    def ours(mu, s, *prior):
        return [vae_fast.gaussian_kl(mu, s, prior, "logstd", "logstd")]

    upstream = [torch.randn(mu.shape[0]).double()]
    got = results_and_gradients(ours, inputs, upstream)
    truth = results_and_gradients(eager, [t.double() for t in inputs], upstream)
    standard = vae_fast.gaussian_kl(*inputs[:2], None, "logstd")
    got.append(standard)
    zero = torch.zeros((), dtype=torch.float64)
    truth += eager(inputs[0].double(), inputs[1].double(), zero, zero)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 8e-3}[dtype]
    for g, t in zip(got, truth, strict=True):
        scale = t.abs().clamp(min=1.0)  # where two terms cancel, neither is larger
        assert ((g.double() - t).abs() / scale).max() < tolerance


def test_kl_of_near_and_far_gaussians(backend):
    """Where log ρ² and ρ² − 1 cancel, and where ρ² is beyond fp32's range."""
    near = torch.logspace(-7, -1, 13, device=backend)[:, None]
    mu = torch.zeros_like(near).requires_grad_()
    s = near.clone().requires_grad_()
    kl = vae_fast.gaussian_kl(mu, s, param="logstd")
    (g,) = torch.autograd.grad(kl.sum(), s)
    t = near.double()
    truth = (0.5 * (torch.expm1(2 * t) - 2 * t)).squeeze(1)
    series = (t * t + 2 / 3 * t**3).squeeze(1)
    truth = torch.where(t.squeeze(1) < 1e-3, series, truth)
    torch.testing.assert_close(kl.double(), truth, rtol=5e-6, atol=0)
    torch.testing.assert_close(g.double(), torch.expm1(2 * t), rtol=2e-6, atol=0)

    far = torch.tensor([[-200.0], [-90.0], [43.0], [300.0]], device=backend)
    other = torch.tensor([[-150.0], [0.0], [0.0], [290.0]], device=backend)
    zero = torch.zeros_like(far)
    kl = vae_fast.gaussian_kl(zero, far, (zero, other), "logstd", "logstd")
    truth = reference.gaussian_kl(
        zero.double(), far.double(), (zero.double(), other.double()), "logstd", "logstd"
    )
    torch.testing.assert_close(kl.double(), truth, rtol=2e-5, atol=0)
    # Equal Gaussians, however narrow, are at no distance.
    assert vae_fast.gaussian_kl(zero + 1, far, (zero + 1, far), "logstd", "logstd").eq(0).all()


def test_kl_of_bad_values_and_of_nothing(fused):
    mu = torch.randn(6, 9, device=fused)
    for target in range(4):
        inputs = [mu.clone() for _ in range(4)]
        inputs[target][3, 4] = torch.nan
        leaves = [t.requires_grad_() for t in inputs]
        kl = vae_fast.gaussian_kl(*leaves[:2], leaves[2:])
        assert torch.isnan(kl).nonzero().tolist() == [[3]]
        for g in torch.autograd.grad(kl.sum(), leaves):
            assert torch.all(torch.isfinite(g[torch.arange(6) != 3]))
    empty = mu[:0].requires_grad_()
    kl = vae_fast.gaussian_kl(empty, empty)
    assert kl.shape == (0,)
    assert torch.autograd.grad(kl.sum(), empty)[0].shape == (0, 9)


# ---- importance weights ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("samples", "batch"), [(1, 5), (3, 1), (7, 130), (300, 9)])
@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_importance_bound(spread, samples, batch, dtype, fused):
    inputs = [spread * torch.randn(samples, batch).to(fused, dtype) for _ in range(3)]
    upstream = [torch.randn(batch).to(fused).double()]

    def ours(*a):
        return [vae_fast.importance_bound(*a, beta=0.7)]

    def plain(nll, log_q, log_p):
        log_w = -(nll + 0.7 * (log_q - log_p))
        return [math.log(samples) - torch.logsumexp(log_w, 0)]

    assert_accurate(
        results_and_gradients(ours, inputs, upstream),
        results_and_gradients(plain, inputs, upstream),
        results_and_gradients(plain, [t.double() for t in inputs], upstream),
        dtype,
    )
    kl = inputs[1] - inputs[2]
    torch.testing.assert_close(vae_fast.importance_bound(inputs[0], kl, beta=0.7), ours(*inputs)[0])


def test_importance_bound_of_infinite_weights(fused):
    nll = torch.zeros(3, 4, device=fused)
    nll[0, 1] = torch.nan
    nll[:, 2] = torch.inf  # no sample has any weight
    nll[1, 3] = torch.inf  # one has none
    rows = vae_fast.importance_bound(nll, torch.zeros_like(nll))
    assert rows[0] == 0
    assert torch.isnan(rows[1])
    assert rows[2] == torch.inf
    assert rows[3].item() == pytest.approx(math.log(1.5), abs=1e-6)


# ---- compilation -------------------------------------------------------------------------------


OPTIONS = [
    {"kl": "analytic", "free_bits": 0.1},
    {"capacity": 2.0},
    {"objective": "iwae", "estimator": "dreg", "num_samples": 3},
    {"estimator": "stl", "likelihood": "student_t"},
    {"likelihood_scale": "optimal_channel"},
    {"likelihood": "logistic", "likelihood_clamp": (-4, 1), "likelihood_clamp_mode": "soft"},
    {"dequantize": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_compile_without_a_graph_break(options, key):
    x = torch.randint(256, (5, 3, 4), dtype=torch.uint8)
    mu, s = torch.randn(2, 5, 2, requires_grad=True).unbind()
    w = torch.randn(2, 12, requires_grad=True)
    channel = torch.zeros(3, 1, requires_grad=True)
    prior = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    elbo = vae_fast.FusedELBO(beta=torch.tensor(0.5), prior=prior, **options)

    def decode(z):
        mean = (z @ w).view(-1, 3, 4)
        return mean if elbo.likelihood_scale else (mean, channel)

    def loss(x, mu, s, key):
        return elbo(x, mu, s, decode, key=key, weight=torch.ones(5)).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = [mu, s, w, elbo.prior_mu, elbo.prior_scale]
    for beta in (0.5, 1.5, 0.0):
        elbo.beta.fill_(beta)
        with torch._dynamo.config.patch(error_on_recompile=beta != 0.5):
            got, want = compiled(x, mu, s, key), loss(x, mu, s, key)
        torch.testing.assert_close(got, want)
        for a, b in zip(
            *(torch.autograd.grad(v, leaves, allow_unused=True) for v in (got, want)), strict=True
        ):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)


# ---- checkpointing -----------------------------------------------------------------------------


def test_every_function_can_be_checkpointed(backend, key):
    """The backward pass computes what was saved anew, so that must happen above the ops."""
    key = key.to(backend)
    y = torch.randn(3, 4, 6, device=backend)
    rows = torch.randn(3, 4, device=backend)
    functions = {
        "reparameterize": lambda a: sum(
            r.sum() for r in vae_fast.reparameterize(a[0], a[1], key=key)
        ),
        "with a generator": lambda a: sum(
            r.sum()
            for r in vae_fast.reparameterize(
                a[0], a[1], generator=torch.Generator(backend).manual_seed(3)
            )
        ),
        "gaussian_nll": lambda a: vae_fast.gaussian_nll(y[0], a[0], a[1]).sum(),
        "shared": lambda a: vae_fast.likelihood_nll(y[0], a[0], a[1, 0], "laplace").sum(),
        "optimal": lambda a: vae_fast.optimal_gaussian_nll(y[0], a[0]).sum(),
        "gaussian_kl": lambda a: vae_fast.gaussian_kl(a[0], a[1], (a[2], a[1])).sum(),
        "importance_bound": lambda a: vae_fast.importance_bound(a.sum(2), rows).sum(),
        "fused_elbo": lambda a: vae_fast.fused_elbo(y[0], a[0], a[1], rows[0], rows[1])[0],
        "none": lambda a: vae_fast.fused_elbo(y[0], a[0], a[1], rows[0], rows[1], reduction="none")[
            0
        ].sum(),
    }
    for name, fn in functions.items():
        results = []
        for reentrant in (None, False, True):
            # Computed from a leaf inside, so that what is saved has to be made anew.
            leaf = y.clone().requires_grad_()
            inner = lambda t, f=fn: f(torch.tanh(t))  # noqa: E731
            if reentrant is None:
                out = inner(leaf)
            else:
                out = torch.utils.checkpoint.checkpoint(inner, leaf, use_reentrant=reentrant)
            results.append(torch.autograd.grad(out, leaf)[0] if reentrant is not True else None)
            if reentrant is True:
                out.backward()
                results[-1] = leaf.grad
        for got in results[1:]:
            torch.testing.assert_close(got, results[0], msg=lambda m, n=name: f"{n}: {m}")


# ---- a batch, an event or a latent of one or none ----------------------------------------------


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_inplace_with_a_shared_scale(batch, fused):
    """One row gives a shared scale the mean's shape; it is still not the decoder's to give."""
    x = torch.rand(batch, 3, 2, device=fused)
    w = torch.randn(4, 6, device=fused)
    rows = torch.zeros(batch, device=fused)
    gradients = []
    for inplace in (False, True):
        z = torch.ones(batch, 4, device=fused, requires_grad=True)
        s = torch.zeros(3, 1, device=fused, requires_grad=True)
        mean = torch.tanh(z @ w).view(-1, 3, 2) + 0.0
        loss, _ = vae_fast.fused_elbo(x, mean, s, rows, rows, reduction="sum", inplace=inplace)
        gradients.append(torch.autograd.grad(loss, (z, s)))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_scalar_events_and_latents(backend):
    x, mu = torch.rand(5, device=backend), torch.randn(5, device=backend, requires_grad=True)
    elbo = vae_fast.FusedELBO(kl="analytic", free_bits=0.2)
    mask = torch.tensor([True, False, True, True, True], device=backend)
    out = elbo(x, mu, mu, lambda z: (z, z), mask=mask)
    assert torch.isfinite(out.loss)
    assert torch.isfinite(out.bits_per_dim[mask]).all()
    assert torch.autograd.grad(out.loss, mu)[0].shape == (5,)


def test_dreg_leaves_what_it_hands_out_alone(backend, key):
    """Only the loss has the weighted gradients; z, log q and log p have their own."""
    mu = torch.randn(3, 2, device=backend, requires_grad=True)
    x = torch.randn(3, 4, device=backend)
    w = torch.randn(2, 4, device=backend)
    found = {}
    for estimator in ("standard", "dreg"):
        elbo = vae_fast.FusedELBO(num_samples=4, objective="iwae", estimator=estimator)
        out = elbo(x, mu, mu, lambda z: (z @ w, z @ w), key=key.to(backend))
        alone, both = (
            torch.autograd.grad(t, mu, retain_graph=True)[0]
            for t in (out.loss, out.loss + out.z.sum() + out.log_p.sum())
        )
        found[estimator] = both - alone
    torch.testing.assert_close(found["dreg"], found["standard"])
