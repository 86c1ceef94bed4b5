"""The noise contract: PyTorch's own stateless stream, on every backend."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import vae_fast
from vae_fast import noise

GOLDEN = np.load(Path(__file__).parent / "golden" / "noise.npz")
CASES = sorted(name.removesuffix("_key") for name in GOLDEN.files if name.endswith("_key"))
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


def drawn(key, batch, num_samples, latent_shape, first_row=0, dtype=torch.float32):
    """ε as the current backend's latent pass uses it: z for μ = 0 and σ = 1."""
    mu = torch.zeros(batch, *latent_shape, dtype=dtype, device=key.device)
    one = torch.zeros((), dtype=dtype, device=key.device)
    return vae_fast.reparameterize(mu, one, num_samples=num_samples, key=key, first_row=first_row)[
        0
    ]


@pytest.mark.parametrize("case", CASES)
def test_golden_stream_of_pytorch(case, backend):
    key = torch.from_numpy(GOLDEN[f"{case}_key"]).to(backend)
    eps = torch.from_numpy(GOLDEN[f"{case}_eps"])
    ours = drawn(key, eps.shape[0], None, eps.shape[1:], dtype=eps.dtype)
    assert (ours.cpu() - eps).abs().max() <= TOLERANCE[eps.dtype]
    reference = noise.normal(key, eps.shape[0], None, eps.shape[1:], dtype=eps.dtype)
    assert (reference.cpu() - eps).abs().max() <= TOLERANCE[eps.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "latent_shape", [(1,), (2,), (3,), (5,), (16,), (63,), (2, 3), (1025,), (5000,)]
)
def test_reference_stream(dtype, latent_shape, fused, key):
    key = key.to(fused)
    for num_samples, first_row in ((None, 0), (3, 5)):
        ours = drawn(key, 5, num_samples, latent_shape, first_row, dtype)
        truth = noise.normal(key, 5, num_samples, latent_shape, first_row, dtype)
        assert ours.shape == truth.shape
        assert (ours - truth).abs().max() <= TOLERANCE[dtype]


@pytest.mark.gpu
def test_live_pytorch_agrees():
    """PyTorch implements its stateless generator on CUDA only."""
    random = pytest.importorskip("torch.func._random")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    for seed in (0, 3, 2**63 + 11):
        key = torch.tensor([seed, 9], dtype=torch.uint64).cuda()
        for dtype in (torch.float32, torch.float64):
            theirs = random.normal(key, (40,), dtype=dtype)
            ours = noise.normal(key, 1, None, (40,), dtype=dtype)[0]
            assert (ours - theirs).abs().max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_uses_the_fp32_stream(dtype, backend, key):
    key = key.to(backend)
    ours = drawn(key, 4, 2, (6,), dtype=dtype)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, noise.normal(key, 4, 2, (6,)).to(dtype), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("num_samples", [None, 3])
def test_first_row_makes_noise_independent_of_the_split(num_samples, backend, key):
    key = key.to(backend)
    whole = drawn(key, 7, num_samples, (5,))
    parts = [drawn(key, 3, num_samples, (5,)), drawn(key, 4, num_samples, (5,), first_row=3)]
    assert torch.equal(whole, torch.cat(parts, dim=0 if num_samples is None else 1))


def test_offset_wraps_around(backend):
    """Counters count modulo 2⁶⁴, and rows carry into the upper word."""
    key = torch.tensor([5, 2**64 - 3], dtype=torch.uint64, device=backend)
    ours = drawn(key, 8, None, (4,))
    wrapped = drawn(torch.tensor([5, 0], dtype=torch.uint64, device=backend), 5, None, (4,))
    assert (ours[3:] - wrapped).abs().max() <= 2e-5


def test_distribution():
    """Moments, independence of the lanes and Kolmogorov–Smirnov over 10⁷ draws."""
    key = torch.tensor([1234, 0], dtype=torch.uint64)
    eps = drawn(key, 2500, None, (4000,))
    n = eps.numel()
    assert n == 10**7
    x = eps.double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x.pow(power).mean().item() - moment) < 5 * (variance / n) ** 0.5
    lanes = x.view(-1, 4)
    correlation = (lanes.T @ lanes / lanes.shape[0]).fill_diagonal_(0).abs().max().item()
    assert correlation < 5 * (1 / lanes.shape[0]) ** 0.5
    assert stats.kstest(eps.flatten().numpy(), "norm").pvalue > 1e-4


def test_make_key_follows_the_generators():
    torch.manual_seed(3)
    first, second = noise.make_key(), noise.make_key()
    assert first.dtype == torch.uint64
    assert first.shape == (2,)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(noise.make_key(), first)
    generator = torch.Generator().manual_seed(4)
    drawn_once = noise.make_key(generator=generator)
    assert torch.equal(drawn_once, noise.make_key(generator=torch.Generator().manual_seed(4)))


def test_seed_decides_the_sample(backend):
    mu, logvar = torch.randn(4, 3, device=backend), torch.randn(4, 3, device=backend)
    torch.manual_seed(11)
    first = vae_fast.reparameterize(mu, logvar)[0]
    second = vae_fast.reparameterize(mu, logvar)[0]
    torch.manual_seed(11)
    assert torch.equal(vae_fast.reparameterize(mu, logvar)[0], first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (torch.zeros(2), ValueError),
        (torch.zeros(3, dtype=torch.uint64), ValueError),
        (torch.zeros(2, dtype=torch.int64), ValueError),
        ([0, 0], TypeError),
    ],
)
def test_bad_keys(bad, error):
    with pytest.raises(error, match="key must be"):
        noise.normal(bad, 2, None, (3,))
