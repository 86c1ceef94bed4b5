"""What eager.cpp repeats of Triton launches is what the launchers would launch.

There is no GPU: a stand-in for CUDA's cuLaunchKernel runs the kernels in Triton's interpreter, on
the very addresses and numbers that it is given.
"""

import ctypes
import functools
import itertools
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vae_fast
from vae_fast import backends, eager

pytest.importorskip("triton")

LAUNCH = ctypes.CFUNCTYPE(
    *(ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p),
    *(ctypes.POINTER(ctypes.POINTER(ctypes.c_int64)), ctypes.c_void_p),
)
STREAM = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))


class Compiled:
    """Stands in for a compiled kernel: knows its signature, as Triton writes it."""

    def __init__(self, handle, kernel, launch, tensors, values):
        self.kernel, self.launch, self.function = kernel, launch, handle
        self.layouts = [
            None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
            for t in tensors
        ]
        given = *tensors, *launch.sizes, *values
        self.names = kernel.arg_names[: len(given)]
        signature = dict(zip(self.names, map(self._kind, self.names, given), strict=True))
        signature |= dict.fromkeys(kernel.arg_names[len(given) :], "constexpr")
        self.src = SimpleNamespace(signature=signature)
        target = SimpleNamespace(backend="cuda", warp_size=32)
        self.metadata = SimpleNamespace(target=target, num_ctas=1, num_warps=4, shared=0)
        self.fixed = dict(zip(self.names, given, strict=True))

    def _kind(self, name, value):
        if isinstance(value, Tensor):
            return "*"
        if isinstance(value, float):
            return "fp64"
        if value is None or (value == 1 and name not in ("B", "N", "first_row")):
            return "constexpr"
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    def run(self, slots):
        """The kernel on what the slots hold."""
        kinds, slots, arguments = self.src.signature, iter(slots), []
        for i, name in enumerate(self.names):
            if kinds[name] == "constexpr":
                arguments.append(self.fixed[name])
            elif kinds[name] == "*":
                arguments.append(at(next(slots)[0], self.layouts[i]))
            else:
                kind = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp64": ctypes.c_double}
                pointer = ctypes.cast(next(slots), ctypes.POINTER(kind[kinds[name]]))
                arguments.append(pointer[0])
        self.kernel[self.launch.grid](*arguments, **self.launch.constants)


def at(address, like):
    """The tensor at an address that is laid out like another."""
    if like.numel() == 0:
        return like
    extent = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True))
    memory = (ctypes.c_byte * (extent * like.element_size())).from_address(address)
    flat = torch.from_numpy(np.ctypeslib.as_array(memory)).view(like.dtype)
    return flat.as_strided(like.shape, like.stride())


class GPU:
    """Counts what was learned and what was repeated."""

    def __init__(self, monkeypatch):
        from vae_fast._triton import launch, repeat

        self.compiled, self.learned, self.described, self.repeated = {}, [], [], []
        self.stream, self.error = None, 0
        kernels = {}
        plain = launch.Launch.__call__

        def remember(this, kernel, tensors, *values):
            kernels[id(this)] = kernel
            plain(this, kernel, tensors, *values)

        def described(op, launches, arguments, results):
            made = []
            for one in launches:
                handle = len(self.compiled) + 1
                kernel = kernels[id(one.launch)]
                compiled = Compiled(handle, kernel, one.launch, one.tensors, one.values)
                self.compiled[handle] = compiled
                made.append(one._replace(compiled=compiled))
            facts = describe(op, made, arguments, results)
            self.described.append(facts)
            return facts

        def learn(op, wanted, *arguments):
            results, facts = repeat.learn(op, wanted, *arguments)
            if wanted:
                self.learned.append(op)
            return results, facts

        def run(handle, grid, y, z, threads, *rest):
            slots = rest[-2]
            if self.error:
                return self.error
            compiled = self.compiled[handle]
            assert (grid, y, z, threads) == (compiled.launch.grid[0], 1, 1, 128)
            self.repeated.append(compiled.kernel.__name__)
            compiled.run(slots[i] for i in range(64))
            return 0

        def stream(device, result):
            result[0] = self.stream
            return 0

        describe = repeat._described
        monkeypatch.setattr(launch.Launch, "__call__", remember)
        monkeypatch.setattr(repeat, "CompiledKernel", Compiled)
        monkeypatch.setattr(repeat, "_described", described)
        pair = functools.cache(
            lambda dtype: (torch.zeros((), dtype=torch.int32), torch.empty(8192, dtype=dtype))
        )
        monkeypatch.setattr(launch, "scratch", lambda t, dtype, partials: pair(dtype))
        held = [t for dtype in (torch.float32, torch.float64) for t in pair(dtype)]
        monkeypatch.setattr(repeat, "is_shared_scratch", lambda t: any(t is s for s in held))
        self.functions = LAUNCH(run), STREAM(stream)  # alive as long as this
        self.addresses = [ctypes.cast(f, ctypes.c_void_p).value for f in self.functions]
        self.learn = learn
        self.repeat()

    def repeat(self):
        """Nothing is known yet."""
        from vae_fast import _triton

        with backends._overriding():
            backends._shortcut.repeat("CPU", _triton.__all__, self.learn, *self.addresses)


@pytest.fixture
def gpu(fused_triton, monkeypatch):
    if fused_triton.type != "cpu":
        pytest.skip("for machines without a GPU")
    vae_fast.reparameterize(torch.zeros(1, 1), torch.zeros(1, 1))
    if eager.shortcut() is None:
        pytest.skip("no C++ compiler, or no Python headers")
    yield GPU(monkeypatch)
    backends._shortcut.repeat()


@pytest.fixture
def key():
    return torch.tensor([7, 11], dtype=torch.uint64)


def step(
    seed, key, dtype=torch.float32, batch=6, beta=0.5, scale="full", levels=False, masked=False,
    strided=False, first_row=0, num_samples=1, **options,
):  # fmt: skip
    """A loss and its gradients; ``seed`` decides all values."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        t = torch.randn(shape, generator=generator, dtype=dtype).to(key.device)
        return t.t().contiguous().t() if strided and t.dim() == 2 else t

    n = num_samples * batch
    x, mu, logvar = randn(batch, 9), randn(batch, 5), randn(batch, 5)
    shape = {"full": (n, 9), "scalar": (), "fixed": (), "row": (n, 1), "event": (1, 9)}
    leaves = [mu, logvar, randn(n, 18 if scale == "packed" else 9)]
    if scale in shape:
        leaves.append(randn(*shape[scale]))
    mask = x > -1 if masked else None
    if levels:
        x = (40 * x.abs()).to(torch.uint8)
    for leaf in leaves:
        leaf.requires_grad_()
    made = [1 * leaf for leaf in leaves[2:]]  # what inplace may overwrite
    if scale == "fixed":
        made[1] = leaves.pop().detach()
    elbo = vae_fast.FusedELBO(beta, num_samples, **options)
    decoder = lambda z: tuple(made) if len(made) > 1 else made[0]  # noqa: E731
    out = elbo(x, mu, logvar, decoder, key=key, mask=mask, first_row=first_row)
    factor = 1 + seed % 3
    gradients = torch.autograd.grad(factor * out.loss.sum(), leaves)
    return [*out[:5], *gradients]


OPTIONS = [
    {},
    {"inplace": True},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"dtype": torch.float64},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16},
    {"scale": "scalar"},
    {"scale": "row"},
    {"scale": "event"},
    {"levels": True},
    {"levels": True, "dequantize": True},
    {"likelihood": "laplace"},
    {"likelihood_clamp": (-1.0, 1.0)},
    {"num_samples": 3},
    {"num_samples": 3, "reduction": "none"},
    {"num_samples": 3, "objective": "iwae"},
    {"masked": True},
    {"masked": True, "levels": True, "inplace": True},
    {"scale": "packed"},
    {"scale": "fixed"},
    {"strided": True},
    {"strided": True, "scale": "packed"},
    {"likelihood": "bernoulli", "scale": "none"},
    {"kl": "analytic"},
]


#: How many launches of a step are repeated, where it is not four: two passes, there and back.
REPEATED = {
    "{'scale': 'event'}": 3,  # PyTorch ends the sums of one
    "{'num_samples': 3, 'reduction': 'none'}": 3,  # the samples' mean is PyTorch's
    "{'num_samples': 3, 'objective': 'iwae'}": 5,  # and the bound; back, PyTorch does it
    "{'kl': 'analytic'}": 5,  # and the KL; z has no gradient here
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_repeated_launch_gives_the_same_bits(options, gpu, key):
    for seed in range(3):
        results = step(seed, key, **options)
        if seed == 0:
            learned = gpu.learned.copy()
    assert gpu.learned == learned  # the first time only
    launched = sum(bool(facts) for facts in gpu.described)
    assert len(gpu.repeated) == 2 * launched
    assert launched == REPEATED.get(str(options), 4)
    backends._shortcut.repeat()
    for a, b in zip(results, step(seed, key, **options), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_on_a_gpu(options, key, monkeypatch):
    from vae_fast._triton import launch, repeat

    vae_fast.reparameterize(*torch.zeros(2, 1, 1, device="cuda"))
    if backends._shortcut is None or repeat.driver() is None:
        pytest.skip("launches come from Python")
    by_python, plain = [], launch.Launch.__call__

    def count(this, *args):
        by_python.append(this)
        return plain(this, *args)

    monkeypatch.setattr(launch.Launch, "__call__", count)
    backends._repeat_launches.__wrapped__()  # no launch is known yet
    counts = [0]
    for seed in range(3):
        results = step(seed, key.cuda(), **options)
        counts.append(len(by_python))
    first, second, third = (b - a for a, b in itertools.pairwise(counts))
    assert first - second == first - third == REPEATED.get(str(options), 4)
    backends._shortcut.repeat()
    try:
        for a, b in zip(results, step(seed, key.cuda(), **options), strict=True):
            assert torch.equal(a, b)
    finally:
        backends._repeat_launches.__wrapped__()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_compiled(key, monkeypatch):
    from vae_fast._triton import launch, repeat

    vae, x, key = vae_fast.VAE.mlp(9, 3, (8,)).cuda(), torch.rand(5, 9).cuda(), key.cuda()
    run = torch.compile(vae, fullgraph=True)

    def gradients(model):
        vae.zero_grad()
        model(x, key).loss.backward()
        return [p.grad for p in vae.parameters()]

    want = gradients(vae)
    if backends._shortcut is None or repeat.driver() is None:
        pytest.skip("launches come from Python")
    gradients(run)
    monkeypatch.setattr(launch.Launch, "__call__", None)
    for a, b in zip(gradients(run), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_threads_that_come_first_register_the_launchers_once(monkeypatch):
    """Whoever registered second would take them from under a launch of the first."""
    from vae_fast._triton import repeat

    registered = []

    def register(*args):
        registered.append(args)
        time.sleep(0.1)  # for the others to come

    monkeypatch.setattr(backends, "_shortcut", SimpleNamespace(repeat=register))
    monkeypatch.setattr(backends, "_register_triton", lambda dispatch_key: None)
    monkeypatch.setattr(backends, "_load_shortcut", lambda path: None)
    monkeypatch.setattr(backends._build, "build_eager", lambda: None)
    monkeypatch.setattr(repeat, "driver", lambda: (1, 2))
    once = functools.cache(backends._repeat_launches.__wrapped__)
    monkeypatch.setattr(backends, "_repeat_launches", once)
    threads = [threading.Thread(target=backends._load, args=("triton", "cuda")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(registered) == 1


def test_whatever_a_launch_follows_from_makes_it_another(gpu, key):
    others = [
        *({"batch": 7}, {"dtype": torch.float64}, {"reduction": "sum"}, {"scale": "scalar"}),
        *(
            {"likelihood": "laplace"},
            {"likelihood_clamp": (-1.0, 1.0)},
            {"posterior_param": "softplus"},
        ),
    ]
    step(0, key)
    for options in others:
        before = len(gpu.learned)
        results = step(1, key, **options)
        assert len(gpu.learned) > before, options
        gpu_results = step(1, key, **options)
        for a, b in zip(results, gpu_results, strict=True):
            assert torch.equal(a, b)


def test_beta_may_change(gpu, key):
    step(0, key)
    learned = len(gpu.learned)
    results = [step(1, key, beta=beta) for beta in (0.25, 4.0)]
    assert len(gpu.learned) == learned
    backends._shortcut.repeat()
    for beta, got in zip((0.25, 4.0), results, strict=True):
        for a, b in zip(got, step(1, key, beta=beta), strict=True):
            assert torch.equal(a, b)


def test_first_row_may_change(gpu, key):
    """Where it needs more than 32 bits, it is another launch."""
    step(0, key, first_row=5)
    learned = len(gpu.learned)
    rows = (0, 1, 16, 2**31 - 1)
    results = [step(1, key, first_row=row) for row in rows]
    assert len(gpu.learned) == learned
    wide = (2**31, 2**40 + 1)
    results += [step(1, key, first_row=row) for row in wide]
    assert len(gpu.learned) == learned + 2  # latent forward and backward
    backends._shortcut.repeat()
    for row, got in zip((*rows, *wide), results, strict=True):
        for a, b in zip(got, step(1, key, first_row=row), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"num_samples": 3}, {"scale": "packed"}], ids=str)
def test_a_step_is_launched_without_python(options, gpu, key, monkeypatch):
    from vae_fast._triton import launch

    step(0, key, **options)
    monkeypatch.setattr(launch.Launch, "__call__", None)
    step(0, key, **options)
    assert len(gpu.repeated) == 4


@pytest.mark.parametrize(
    "what", ["argument", "in place", "another result", "one result more", "memory for more"]
)
def test_what_pytorch_does_beside_the_launch_is_not_skipped(what, gpu, key, monkeypatch):
    from vae_fast._triton import repeat

    from vae_fast import _triton

    plain = _triton.latent_forward

    def more(mu, scale, *options):
        if what == "argument":
            mu.add_(1)
        z, *rows = plain(mu, scale, *options)
        if what == "in place":
            z.mul_(2)
        if what == "another result":
            z = z + 0
        if what == "one result more":
            rows.append(z.sum())
        if what == "memory for more":  # of which another view may be a result as well
            z.untyped_storage().resize_(2 * z.nbytes)
        return z, *rows

    monkeypatch.setattr(_triton, "latent_forward", more)
    zeros = torch.zeros(2, 3, dtype=torch.float32)
    options = 0, 0, 0, -float("inf"), float("inf"), False, False
    _, facts = repeat.learn("latent_forward", True, zeros, zeros.clone(), key, *options)
    assert facts is None
    monkeypatch.setattr(_triton, "latent_forward", plain)
    _, facts = repeat.learn("latent_forward", True, zeros, zeros.clone(), key, *options)
    assert facts


def test_a_launch_that_a_hook_sees_is_not_learned(gpu, key, monkeypatch):
    from triton import knobs

    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "launch_enter_hook", lambda metadata: None)
        step(0, key)
        step(0, key)
    assert gpu.described == [False] * 8
    assert not gpu.repeated
    step(0, key)
    assert all(gpu.described[8:])


def test_an_unknown_triton_launches_from_python(gpu, key, monkeypatch):
    from vae_fast._triton import repeat

    want = step(0, key)
    gpu.repeat()
    monkeypatch.setattr(repeat, "_described", lambda *_: 1 / 0)
    for _ in range(2):
        for a, b in zip(step(0, key), want, strict=True):
            assert torch.equal(a, b)
    assert not gpu.repeated


def test_addresses_of_another_alignment_are_another_launch(gpu, key):
    def sample(start):
        mu, logvar = ((torch.arange(24.0) / 10)[start : start + 20].view(5, 4) for _ in range(2))
        return vae_fast.reparameterize(mu, logvar, key=key)

    sample(0)
    sample(0)
    assert (len(gpu.learned), len(gpu.repeated)) == (1, 1)
    sample(1)
    assert (len(gpu.learned), len(gpu.repeated)) == (2, 1)


def test_one_tensor_in_two_places_is_not_learned(gpu, key):
    """It may be two tensors next time, of the very same layout."""
    same, one, two = (torch.randn(5, 4) for _ in range(3))
    vae_fast.reparameterize(same, same, key=key)
    assert gpu.described == [False]
    z = vae_fast.reparameterize(one, two, key=key)
    assert gpu.described[1]
    assert not gpu.repeated
    backends._shortcut.repeat()
    assert torch.equal(z[0], vae_fast.reparameterize(one, two, key=key)[0])


def test_on_another_stream_python_launches(gpu, key):
    """Whose scratch memory is not shared; and what is not learned there may be learned later."""
    gpu.stream = 1
    step(0, key)
    step(0, key)
    assert not gpu.learned
    gpu.stream = None
    step(0, key)
    step(0, key)
    assert gpu.learned
    assert gpu.repeated


def test_a_thread_without_a_context_gets_one_from_python(gpu, key):
    want = step(0, key)
    gpu.error = 201  # CUDA_ERROR_INVALID_CONTEXT
    for a, b in zip(step(0, key), want, strict=True):
        assert torch.equal(a, b)
    assert not gpu.repeated


def test_another_thread_may_begin_anew_meanwhile(gpu, key, monkeypatch):
    """Two threads that use a GPU for the first time, say: nobody's memory is freed."""
    from vae_fast import _triton

    plain, t = _triton.latent_forward, torch.ones(5, 4)
    want = vae_fast.reparameterize(t, t.clone(), key=key)

    def begin_anew(*args):
        thread = threading.Thread(target=gpu.repeat)
        thread.start()
        thread.join()
        return plain(*args)

    gpu.repeat()
    monkeypatch.setattr(_triton, "latent_forward", begin_anew)
    for _ in range(20):
        got = vae_fast.reparameterize(t, t.clone(), key=key)
        assert torch.equal(got[0], want[0])
    monkeypatch.setattr(_triton, "latent_forward", plain)
    for _ in range(2):
        vae_fast.reparameterize(t, t.clone(), key=key)
    assert gpu.repeated


def test_a_launch_that_fails_raises(gpu, key):
    step(0, key)
    gpu.error = 719
    with pytest.raises(
        RuntimeError, match="latent_forward: cuLaunchKernel failed with CUDA error 719"
    ):
        step(0, key)


def test_compiled_steps_are_launched_without_python(gpu, key, monkeypatch):
    from vae_fast._triton import launch

    vae = vae_fast.VAE.mlp(9, 3, hidden=(8,))
    compiled, x = torch.compile(vae, fullgraph=True, backend="aot_eager"), torch.rand(5, 9)

    def gradients(model):
        vae.zero_grad()
        model(x, key).loss.backward()
        return [p.grad for p in vae.parameters()]

    want = gradients(vae)
    gradients(compiled)
    monkeypatch.setattr(launch.Launch, "__call__", None)
    gpu.repeated.clear()
    for a, b in zip(gradients(compiled), want, strict=True):
        torch.testing.assert_close(a, b)
    assert len(gpu.repeated) == 4


def test_inference_is_launched_without_python(gpu, key, monkeypatch):
    from vae_fast._triton import launch

    vae, x = vae_fast.VAE.mlp(9, 3, hidden=(8,)), torch.rand(5, 9)
    options = 0, 0, 0, -float("inf"), float("inf"), False, False

    def results():
        ones = torch.ones(5, 3)
        z, *_ = torch.ops.vae_fast.latent_forward(ones, ones.clone(), key, *options)
        return vae(x, key).loss, z

    with torch.inference_mode():
        want = results()
        monkeypatch.setattr(launch.Launch, "__call__", None)
        got = results()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert len(gpu.repeated) == 3


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_who_watches_sees_the_ops(gpu, key):
    names = {"vae_fast::latent_forward", "vae_fast::latent_backward"}
    want = step(0, key)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        profiled = step(0, key)
    assert names <= {event.key for event in profile.key_averages()}
    with Watch() as watch:
        watched = step(0, key)
    assert names <= watch.names
    for results in (profiled, watched):
        for a, b in zip(results, want, strict=True):
            assert torch.equal(a, b)
