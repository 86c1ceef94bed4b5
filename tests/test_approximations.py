"""How far PTX's approximate functions lead the kernels astray: see benchmarks/accuracy.py.

On a GPU, for every word and every number there is, against the bounds stored with the audit, beside
which pytest's report (--junit-xml) has what was found; without one, that those bounds are what the
emulation gives, and that it errs as it should.
"""

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from vae_fast._triton.elementary import FP16, FP32, PLAIN, widen

from benchmarks import accuracy
from vae_fast import noise

STORED = Path(__file__).parents[1] / "benchmarks" / "results" / "audit" / "accuracy.json"
BLOCK = 1 << 24
#: Quantities of one parameter, which there is time to try every number of.
QUICK = ("scale_errors", "root_errors", "kl_errors")

on_nvidia = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.version.hip is not None, reason="needs an NVIDIA GPU"
)


@pytest.fixture(scope="module")
def stored():
    return json.loads(STORED.read_text())


KINDS = {FP32.value: "bounds", FP16.value: "bounds of 16 bits"}


@pytest.fixture(scope="module", params=KINDS, ids=("fp32", "fp16"))
def approx(request):
    """The codes of approximate functions."""
    return request.param


@pytest.fixture(scope="module")
def bounds(stored, approx):
    """The stored bounds, and a tenth more: a GPU fuses additions, which then round otherwise."""
    return {name: 1.1 * stored[KINDS[approx]].get(name, 0.0) for name in stored["exact"]}


def words():
    """All words, int64, in blocks on the GPU."""
    for start in range(0, 1 << 32, BLOCK):
        yield torch.arange(start, start + BLOCK, device="cuda")


def numbers(lo, hi, device="cuda"):
    """All fp32 numbers of a range without zero, from the larger end of one sign, in blocks."""
    sign = math.copysign(1.0, lo + hi)
    first, last = sorted(int(np.float32(abs(end)).view(np.int32)) for end in (lo, hi))
    for start in range(first, last + 1, BLOCK):
        bits = torch.arange(start, min(start + BLOCK, last + 1), device=device)
        yield sign * bits.to(torch.int32).view(torch.float32)


def worst_of(errors, record_property):
    """The largest of each name, which the report keeps."""
    worst = {}
    for some in errors:
        for name, error in some.items():
            worst[name] = max(worst.get(name, 0.0), error)
    for name, error in worst.items():
        record_property(name, error)
    return worst


def beyond(worst, bounds):
    return {name: (error, bounds[name]) for name, error in worst.items() if error > bounds[name]}


@pytest.mark.gpu
@on_nvidia
@pytest.mark.parametrize("which", ["radius", "angle"])
def test_every_normal_is_within_its_bound(stored, which, record_property):
    """Every radius with an angle of zero and a quarter turn; every angle with the longest one."""
    if which == "radius":
        pairs = ((w, torch.full_like(w, a)) for w in words() for a in (0, 1 << 30))
    else:
        pairs = ((torch.zeros_like(w), w) for w in words())
    errors = (accuracy.errors_of_noise(*pair, FP32.value) for pair in pairs)
    assert worst_of(errors, record_property)["ε"] <= 1.1 * stored["bounds"]["ε"]


@pytest.mark.gpu
@on_nvidia
@pytest.mark.parametrize("param", accuracy.PARAMS)
def test_every_scale_is_within_its_bound(bounds, approx, param, record_property):
    """For σ of e^-40 to e^40, all the numbers that mean such, but for the smallest."""
    lo, hi = accuracy.parameter(param, torch.tensor([-40.0, 40.0])).tolist()
    ranges = [(lo, hi)] if lo > 0.0 else [(lo, -(2.0**-120)), (2.0**-120, hi)]
    errors = (accuracy.errors_of_scale(param, s, approx) for r in ranges for s in numbers(*r))
    assert not beyond(worst_of(errors, record_property), bounds)


@pytest.mark.gpu
@on_nvidia
@pytest.mark.parametrize(
    ("errors_of", "most"), [(accuracy.errors_of_root, 348.0), (accuracy.errors_of_kl, 40.0)]
)
def test_every_root_and_kl_is_within_its_bound(bounds, approx, errors_of, most, record_property):
    """But for the smallest numbers, of which roots are 1, and e^t - 1 - t is no normal number."""
    ranges = ((-most, -(2.0**-60)), (2.0**-60, most))
    errors = (errors_of(t, approx) for r in ranges for t in numbers(*r))
    assert not beyond(worst_of(errors, record_property), bounds)


@pytest.mark.gpu
@on_nvidia
def test_every_measure_is_within_its_bound(bounds, approx, record_property):
    """The likelihoods, of several numbers at once: the sample that the bounds were made with."""
    errors = (measure(approx, torch.device("cuda")) for measure in accuracy.measures())
    assert not beyond(worst_of(errors, record_property), bounds)


# ---- without a GPU -----------------------------------------------------------------------------

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off")


def test_the_stored_bounds_are_of_the_documented_errors(stored):
    assert stored["documented"] == accuracy.DOCUMENTED
    for kind in KINDS.values():
        # What has no bound is exact; no bound is below what fp32 itself costs, nor means much.
        assert not any(e for name, e in stored["exact"].items() if name not in stored[kind])
        assert all(stored["exact"][n] <= bound <= 1e-5 for n, bound in stored[kind].items())
        assert stored[kind]["ε"] <= 2e-5  # what the noise may differ by from PyTorch's


@interpreted
def test_the_stored_bounds_are_what_the_emulation_gives(stored, approx):
    """Of the quantities of one parameter, one by one; the others take minutes."""
    quick = [m for m in accuracy.measures() if getattr(m, "func", m).__name__ in QUICK]
    found = accuracy.bounds(approx, quick)
    assert len(found) >= 3
    for name, bound in found.items():
        assert bound == pytest.approx(stored[KINDS[approx]][name], rel=1e-3), name


@triton.jit
def widen_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr, APPROX: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, widen(tl.load(x_ptr + i), tl.float32, APPROX))


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=interpreted),
        pytest.param("cuda", marks=[pytest.mark.gpu, on_nvidia]),
    ],
)
def test_every_bf16_number_widens_to_itself(device):
    """Infinities and NaN with it, bit by bit."""
    x = torch.arange(-(1 << 15), 1 << 15, device=device).to(torch.int16).view(torch.bfloat16)
    y = torch.empty_like(x, dtype=torch.float32)
    with accuracy.Emulation() if device == "cpu" else contextlib.nullcontext():
        widen_kernel[(1,)](x, y, BLOCK=1 << 16, APPROX=FP16.value)
    assert torch.equal(y.view(torch.int32), x.view(torch.int16).to(torch.int32) << 16)


def test_all_numbers_of_a_range_are_tried():
    some = torch.cat(list(numbers(-1.0, -(1.0 - 2.0**-20), "cpu"))).tolist()
    assert some == [-1.0 + 2.0**-20 - k * 2.0**-24 for k in range(17)]


@interpreted
@pytest.mark.parametrize("name", accuracy.DOCUMENTED)
def test_the_emulation_errs_by_what_is_documented(name):
    """Up and down, and by the whole of it."""
    exact = np.array([0.3, 0.7, 0.9])
    size, unit, *_ = accuracy.DOCUMENTED[name].split()
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    for sign in (-1, 1):
        moved = accuracy._moved(exact, name, sign).astype(np.float64)
        error = sign * (moved - exact)
        assert (error > 0.0).all()
        if unit == "ulp":
            most, rounding = float(size) * ulp, 0.5 * ulp
        else:
            most, rounding = 2.0 ** float(size.removeprefix("2^")), 0.5 * ulp
            most = most * exact if unit == "relative" else most
        assert (np.abs(error - most) <= rounding).all()


@interpreted
def test_the_emulation_draws_a_way_for_every_value():
    exact = np.full(100, 0.7)
    emulation = accuracy.Emulation(draws=np.random.default_rng(0))
    moved = emulation._approximate("rcp.approx.ftz.f32", exact)
    assert {-1.0, 1.0} == set(np.sign(moved - exact.astype(np.float32)).tolist())


@interpreted
def test_a_function_that_errs_more_is_noticed(stored, monkeypatch):
    """The bounds are no wider than they must be: ten times the error of e^x is beyond them."""
    monkeypatch.setitem(accuracy.DOCUMENTED, "ex2.approx.ftz.f32", "20 ulp")
    (measure,) = (
        m for m in accuracy.measures() if "σ (logvar)" in m(PLAIN.value, torch.device("cpu"))
    )
    found = accuracy.bounds(FP32.value, [measure])
    assert found["σ (logvar)"] > 2.0 * stored["bounds"]["σ (logvar)"]


def test_the_noise_of_the_bounds_is_that_of_the_package():
    """``accuracy.normals``'s truth is noise.py's: a pair has the radius that its word says."""
    x = torch.tensor([0, 1 << 31, (1 << 32) - 1])
    u = noise._uniform(x).double()
    radius = (-2.0 * u.log()).sqrt()
    cos, sin = noise._box_muller(u, noise._uniform(torch.zeros_like(x)).double())
    torch.testing.assert_close(torch.hypot(cos, sin), radius)
    assert radius[0].item() == pytest.approx(math.sqrt(2.0 * 33 * math.log(2.0)))
