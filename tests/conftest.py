"""What the tests share: the Triton interpreter's switch, the backends, and error measures."""

import os
import sys
from pathlib import Path

import pytest
import torch

# Triton reads this when its kernels are defined, so it comes before any import of them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import vae_fast
from vae_fast import backends

# The benchmarks, which are not installed; last, so that what is installed is what is tested.
ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "benchmarks")]

FUSED = ("cpp", "triton")


def _skip_unless_it_runs(name):
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    reason = backends.why_not(name, device)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return torch.device(device)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=FUSED)
def fused(request):
    """Each fused backend in turn, forced; yields the device it runs on."""
    device = _skip_unless_it_runs(request.param)
    with vae_fast.use_backend(request.param):
        yield device


@pytest.fixture(params=(*FUSED, "reference"))
def backend(request):
    """Each backend in turn, forced; yields the device it runs on."""
    device = _skip_unless_it_runs(request.param)
    with vae_fast.use_backend(request.param):
        yield device


@pytest.fixture
def cpp():
    """The C++ backend, forced; yields the device it runs on."""
    device = _skip_unless_it_runs("cpp")
    with vae_fast.use_backend("cpp"):
        yield device


@pytest.fixture
def fused_triton():
    """The Triton backend, forced; yields the device it runs on."""
    device = _skip_unless_it_runs("triton")
    with vae_fast.use_backend("triton"):
        yield device


@pytest.fixture
def launched_by_python():
    """Every launch comes from Python, where it can be watched, and none from eager.cpp."""
    vae_fast.reparameterize(torch.zeros(1, 1), torch.zeros(1, 1))
    if torch.cuda.is_available():
        vae_fast.reparameterize(*torch.zeros(2, 1, 1, device="cuda"))
    if backends._shortcut is None:
        yield
        return
    backends._shortcut.repeat()
    yield
    if torch.cuda.is_available():
        backends._repeat_launches.__wrapped__()


@pytest.fixture
def key():
    return torch.tensor([20261122, 7], dtype=torch.uint64)
