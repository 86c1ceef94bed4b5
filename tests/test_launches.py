"""What a training step launches: every kernel, every other device operation, and no wait for them.

The Triton kernels run in the interpreter, or on a GPU where there is one; either way they are
counted where they are launched, and PyTorch's own operations in its profiler.
"""

import contextlib
import functools
from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

import vae_fast

pytest.importorskip("triton")

from vae_fast._triton import importance, kl, latent, launch, likelihood

KERNELS = {
    latent: ("latent_forward_kernel", "latent_backward_kernel"),
    likelihood: ("likelihood_kernel", "rescale_kernel"),
    kl: ("kl_forward_kernel", "kl_backward_kernel"),
    importance: ("importance_kernel",),
}
B, L, D = 4, 6, 8

# Operations that launch nothing: they allocate, or look at memory in another way.
FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "set_", "detach", "alias", "view"),
    *("as_strided", "expand", "expand_as", "select", "t", "transpose", "permute", "unsqueeze"),
    *("flatten", "unflatten", "view_as", "result_type", "squeeze", "lift_fresh"),
}
# Operations that may copy, or not.
COPIES = {"to", "contiguous", "reshape"}
# What makes the host wait for the device.
WAITS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


class _Kernel:
    """Stands for a kernel, and notes its launches in the profile."""

    def __init__(self, kernel, name, running):
        self.kernel, self.name, self.running = kernel, name, running

    def __getitem__(self, grid):
        def run(*args, **options):
            self.running.append(self.name)
            with record_function(f"launch {self.name}"):
                self.kernel[grid](*args, **options)
            self.running.pop()

        return run


class _Decoder(torch.autograd.Function):
    """A decoder that launches nothing: its results and its gradient are there already."""

    @staticmethod
    def forward(ctx, z, results, gradient):
        ctx.gradient = gradient
        return results

    @staticmethod
    def backward(ctx, *_):
        return ctx.gradient, None, None


@pytest.fixture
def launched(fused_triton, launched_by_python, monkeypatch):
    """A training step; gives how often it launched each kernel, and each of PyTorch's operations.

    Waiting for the device is an error while it runs.
    """
    device, running = fused_triton, []
    for module, names in KERNELS.items():
        for name in names:
            kernel = _Kernel(getattr(module, name), name.removesuffix("_kernel"), running)
            monkeypatch.setattr(module, name, kernel)
    if device.type == "cpu":  # where scratch memory is not kept
        make = launch.scratch
        pair = functools.cache(lambda dtype: make(torch.empty(0), dtype, launch.MAX_PARTIALS))
        monkeypatch.setattr(launch, "scratch", lambda t, dtype, partials: pair(dtype))

    def step(x, num_samples, scale, latent_scale, key, watch, **options):
        """One step; ``watch`` runs what is to be counted."""
        n = num_samples * B
        mu = torch.randn(B, L, device=device, requires_grad=True)
        s = torch.randn(latent_scale, device=device, requires_grad=True)
        gradient, one = torch.randn(n, L, device=device), torch.ones((), device=device)
        mean = torch.randn(n, D, device=device)
        if scale == "packed":
            results, own = torch.randn(n, 2 * D, device=device), None
        elif scale == "full":
            results, own = (mean, torch.randn(n, D, device=device)), None
        else:
            results, own = mean, scale.clone().to(device).requires_grad_()

        def decoder(z):
            decoded = _Decoder.apply(z, results, gradient)
            return decoded if own is None else (decoded, own)

        elbo = vae_fast.FusedELBO(num_samples=num_samples, **options)
        x = torch.rand(B, D, device=device) if x is None else x.to(device)
        watch(lambda: elbo(x, mu, s, decoder, key=key).loss.backward(one))

    def run(x=None, num_samples=1, scale="full", latent_scale=(B, L), key=None, **options):
        key = None if key is None else key.to(device)
        events = []

        def watch(fn):
            with monkeypatch.context() as m, profile(activities=[ProfilerActivity.CPU]) as p:
                for name in WAITS:
                    m.setattr(torch.Tensor, name, _refused(name, running))
                with _no_waiting(device):
                    fn()
            events.extend(p.events())

        # Once before: kernels are compiled, and scratch memory is made.
        for how in (lambda fn: fn(), watch):
            step(x, num_samples, scale, latent_scale, key, how, **options)
        return _count(events)

    return run


@contextlib.contextmanager
def _no_waiting(device):
    """On a GPU, PyTorch itself refuses whatever waits for it."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def _refused(name, running):
    """A method of tensors that the interpreter may call, and nobody else."""
    method = getattr(torch.Tensor, name)

    def call(*args, **kwargs):
        assert running, f"the step waits for the device: Tensor.{name}"
        return method(*args, **kwargs)

    return call


def _count(events):
    kernels, others = Counter(), Counter()
    for event in events:
        above = []
        parent = event.cpu_parent
        while parent is not None:
            above.append(parent.name)
            parent = parent.cpu_parent
        if any(name.startswith("launch ") for name in above):
            continue  # the interpreter's own
        if event.name.startswith("launch "):
            kernels[event.name.removeprefix("launch ")] += 1
        elif event.name.startswith("aten::") and not any(n.startswith("aten::") for n in above):
            name = event.name.removeprefix("aten::")
            if name not in FREE and not (name in COPIES and not _copies(event)):
                others[name] += 1
    return dict(kernels), dict(others)


def _copies(event):
    return event.name == "aten::copy_" or any(map(_copies, event.cpu_children))


LEVELS = torch.arange(B * D, dtype=torch.uint8).view(B, D)
# A fresh key.
KEY = {"randint": 1}
# The gradient of the likelihood is written in the forward pass; rescaled only if it must be.
FOUR = {"latent_forward": 1, "likelihood": 1, "rescale": 1, "latent_backward": 1}
# One that rows share, or of rows weighted later, has a pass of its own.
FIVE = {"latent_forward": 1, "likelihood": 2, "latent_backward": 1}

OPTIONS = {
    "default": ({}, FOUR, {}),
    "packed": ({"scale": "packed"}, FOUR, {}),
    "in place": ({"inplace": True}, FOUR, {}),
    "packed, in place": ({"scale": "packed", "inplace": True}, FOUR, {}),
    "K samples": ({"num_samples": 3}, FOUR, {}),
    "levels": ({"x": LEVELS, "dequantize": True}, FOUR, {}),
    "one variance": ({"scale": torch.zeros(())}, FOUR, {}),
    "one posterior variance": ({"latent_scale": ()}, FOUR, {}),
    "stl": ({"estimator": "stl"}, FOUR, {}),
    # The parts that the likelihood left are summed, and take the shape of the scale.
    "a variance per element": ({"scale": torch.zeros(D)}, FIVE, {"sum": 1, "copy_": 1}),
    # Both passes have gradients for mu and its scale.
    "analytic KL": (
        {"kl": "analytic"},
        FOUR | {"kl_forward": 1, "kl_backward": 1},
        {"add": 2},
    ),
    # β(log q - log p), and back.
    "β as a tensor": ({"beta": torch.tensor(2.0)}, FOUR, {"sub": 1, "mul": 2, "neg": 1}),
    # The mean of the bounds and its gradient; the weights times it, β times that, and minus that.
    "IWAE": (
        {"num_samples": 3, "objective": "iwae"},
        FIVE | {"importance": 1},
        {"mean": 1, "div": 1, "mul": 2, "neg": 1},
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_a_step_launches(launched, name):
    options, kernels, others = OPTIONS[name]
    assert launched(**options) == (kernels, KEY | others)


def test_a_given_key_is_not_drawn(launched, key):
    assert launched(key=key) == (FOUR, {})
