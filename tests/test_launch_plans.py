"""The Triton launchers' shortcut past Triton's own search for the kernel: see launch_job.py."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

JOB = Path(__file__).with_name("launch_job.py")


@pytest.mark.parametrize("seed", [1, 2])
def test_planned_launches_are_those_of_triton(seed, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(JOB), str(seed), "300"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "all launches are Triton's"


HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("backend", "dtypes", "wanted"),
    [
        ("cuda", (HALF, HALF), "FP16"),
        ("cuda", (torch.float16, None), "FP16"),
        ("cuda", (HALF, SINGLE), "FP32"),
        ("cuda", (SINGLE, SINGLE), "FP32"),
        ("cuda", (SINGLE, DOUBLE), "PLAIN"),
        ("cuda", (DOUBLE, HALF), "PLAIN"),
        ("hip", (HALF, HALF), "PLAIN"),
        ("interpreter", (HALF, HALF), "PLAIN"),
    ],
)
def test_functions_are_as_exact_as_the_widest_tensor_deserves(backend, dtypes, wanted):
    """And PTX, which is NVIDIA's, stays there."""
    from vae_fast._triton import elementary, launch

    tensors = [None if d is None else torch.empty(2, dtype=d) for d in dtypes]
    where = launch.Place(backend, 0, 132, 32)
    assert launch.approximation(where, *tensors) == getattr(elementary, wanted).value


@pytest.mark.parametrize(
    ("mean", "scale", "wanted"),
    [(HALF, HALF, "FP16"), (HALF, SINGLE, "FP32"), (SINGLE, HALF, "FP32")],
)
def test_a_likelihood_is_as_exact_as_its_mean_and_scale(mean, scale, wanted):
    """Its data, fp32 here, change nothing."""
    from vae_fast._triton import elementary, launch, likelihood

    where = launch.Place("cuda", -1, 132, 32)
    layouts = [launch.layout(torch.empty(4, 8, dtype=d)) for d in (SINGLE, mean, scale)]
    options = False, False, likelihood.MEAN, 0, 0, 0, True, False, False
    plan = likelihood._plan(where, *layouts, *[None] * 8, *options)
    assert plan.launch.constants["APPROX"] == getattr(elementary, wanted).value


@pytest.mark.parametrize(
    ("posterior", "prior", "wanted"),
    [(HALF, HALF, "FP16"), (HALF, SINGLE, "FP32"), (HALF, None, "FP16")],
)
def test_a_kl_is_as_exact_as_both_distributions(posterior, prior, wanted):
    from vae_fast._triton import elementary, kl, launch

    where = launch.Place("cuda", -1, 132, 32)
    tensors = [None if d is None else torch.empty(4, 8, dtype=d) for d in (posterior, prior)]
    mu, prior_mu = map(launch.layout, tensors)
    plan = kl._plan(where, (mu, mu, prior_mu, prior_mu), None, 0, 0, 0)
    assert plan.launch.constants["APPROX"] == getattr(elementary, wanted).value


@pytest.mark.parametrize(
    "kernel", ["latent", "latent backward", "likelihood", "packed", "rescale", "kl"]
)
def test_rows_too_large_to_be_numbered_are_refused(kernel):
    from vae_fast._triton import kl, latent, launch, likelihood

    where = launch.Place("cuda", -1, 132, 32)
    options = False, False, likelihood.MEAN, 0, 0, 0, True, True, True

    def plan(size):
        x, t = (launch.layout(torch.empty(4, 1).expand(4, n)) for n in (size // 2, size))
        return {
            "latent": lambda: latent._forward_plan(where, t, t, 1, False, 0, 0),
            "latent backward": lambda: latent._backward_plan(
                where, t, None, None, t, t, 1, False, 0, 0, False
            ),
            "likelihood": lambda: likelihood._plan(where, t, t, t, *[None] * 8, *options),
            "packed": lambda: likelihood._plan(where, x, t, *[None] * 9, *options),
            "rescale": lambda: likelihood._rescale_plan(
                where, t, t, None, None, None, likelihood.MEAN, 1, 4
            ),
            "kl": lambda: kl._plan(where, (t, t, None, None), None, 0, 0, 0),
        }[kernel]()

    plan(2**30)
    with pytest.raises(ValueError, match=r"(mu|mean) has 1073741826 elements in a row"):
        plan(2**30 + 2)


def test_scratch_memory_is_shared_on_the_default_stream_alone(monkeypatch):
    """On any other it may lie in a CUDA graph's pool, which takes it back."""
    from vae_fast._triton import launch

    stream = 0
    monkeypatch.setattr(launch, "_scratch", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: stream, raising=False)
    gpu = SimpleNamespace(is_cuda=True, device=torch.device("cpu"))  # as far as it is looked at

    def counter(partials):
        return launch.scratch(gpu, torch.float32, partials)[0]

    first = counter(10)
    assert counter(launch.MAX_PARTIALS) is first
    more = counter(launch.MAX_PARTIALS + 1)
    assert more is not first
    assert counter(10) is more
    stream = 7
    others = [counter(10), counter(10)]
    assert others[0] is not others[1]
    assert all(other is not more for other in others)
    stream = 0
    assert counter(10) is more
