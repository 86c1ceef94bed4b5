"""Threads, forked and spawned processes, DataLoader workers, and what is sent between them."""

import copy
import io
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import vae_fast
from vae_fast import _build, buffers

pytestmark = pytest.mark.works_with("threads, fork and DataLoader workers")

THREADS = 8
TESTS = Path(__file__).parent
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.fixture(autouse=True)
def _backend():
    """The backend that a fresh process would have, for the children, too."""
    with vae_fast.use_backend(vae_fast.backends.backend_for("cpu")):
        yield


def step(seed, batch=64, size=784):
    """One loss with its gradients, all of a seed."""
    g = torch.Generator().manual_seed(seed)
    key = torch.tensor([seed, 1], dtype=torch.uint64)
    mu, s = (torch.randn(batch, 16, generator=g).requires_grad_() for _ in range(2))
    x = torch.randn(batch, size, generator=g)
    mean, scale = (torch.randn(batch, size, generator=g).requires_grad_() for _ in range(2))
    shared = torch.randn(size, generator=g).requires_grad_()
    z, log_q, log_p = vae_fast.reparameterize(mu, s, key=key)
    loss, nll = vae_fast.fused_elbo(x, mean, scale, log_q, log_p)
    other = vae_fast.gaussian_nll(x, mean, shared).sum() + vae_fast.gaussian_kl(mu, s).sum()
    total = loss + 1e-3 * other + z.sum()
    return [total.detach(), nll.detach(), *torch.autograd.grad(total, (mu, s, mean, scale, shared))]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b))


def in_threads(work, count=THREADS):
    """Calls work(i) in threads that start together; their results, or the first error."""
    results, errors, start = [None] * count, [], threading.Barrier(count)

    def run(i):
        try:
            start.wait(60)
            results[i] = work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)  # some of them build the kernels
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]
    return results


# ---- threads -----------------------------------------------------------------------------------


# The larger gradients are those that vae_fast.buffers hands out.
@pytest.mark.parametrize("size", [33, 784, buffers.SMALLEST // 4 // 64 + 5])
def test_threads_compute_what_one_does(size):
    serial = [step(i, size=size) for i in range(THREADS)]
    for _ in range(3):
        found = in_threads(lambda i: [step(i, size=size) for _ in range(4)])
        for i, results in enumerate(found):
            assert all(same(r, serial[i]) for r in results), f"thread {i}"


def test_backward_passes_in_other_threads():
    """A graph is walked in another thread than the one that made it."""
    batch, size = 64, buffers.SMALLEST // 4 // 64 + 5
    made = []
    for seed in range(THREADS):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, size, generator=g)
        mean, scale = (torch.randn(batch, size, generator=g).requires_grad_() for _ in range(2))
        log = torch.zeros(batch)
        made.append((vae_fast.fused_elbo(x, mean, scale, log, log)[0], mean, scale, x))
    in_threads(lambda i: made[i][0].backward())
    for _, mean, scale, x in made:
        m, s = (t.detach().clone().requires_grad_() for t in (mean, scale))
        vae_fast.fused_elbo(x, m, s, log, log)[0].backward()
        assert torch.equal(mean.grad, m.grad)
        assert torch.equal(scale.grad, s.grad)


def test_kept_buffers_are_not_shared_while_threads_step():
    """Gradients that are still alive keep their memory to themselves."""
    size = buffers.SMALLEST // 4 // 64

    def work(i):
        held = [step(i, size=size) for _ in range(3)]
        copies = [[t.clone() for t in r] for r in held]
        for other in range(3):
            step(100 + other, size=size)
        return all(same(a, b) for a, b in zip(held, copies))

    assert all(in_threads(work))


# Every thread is the first to use the kernels, which may have to be built.
FIRST_USE = """
import threading
import test_concurrency as t
results = t.in_threads(lambda i: t.step(1))
serial = t.step(1)
assert all(t.same(r, serial) for r in results)
print(t._build.load().origin if t._build.can_build() is None else "", threading.active_count())
"""


def python(script, **environment):
    """What a script prints in a process of its own, where a warning of this package is an error."""
    done = subprocess.run(
        [sys.executable, "-W", "error:::vae_fast", "-c", script],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join((str(TESTS), *filter(None, sys.path)))}
        | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_first_use_by_several_threads():
    python(FIRST_USE)


def test_first_use_by_several_threads_that_must_build(tmp_path):
    if vae_fast.backends.backend_for("cpu") != "cpp" or _build.can_build() is not None:
        pytest.skip("the C++ kernels cannot be built here")
    if eager := _build.build_eager():  # takes long: only the kernels are built anew
        shutil.copytree(eager.parent, tmp_path / eager.parent.name)
    assert python(FIRST_USE, VAE_FAST_CACHE=str(tmp_path)) == ["built", "now", "1"]
    built = [p for p in tmp_path.iterdir() if (p / _build.LIB_NAME).exists()]
    assert len(built) == 1


def test_contexts_of_threads_may_close_in_any_order():
    before = vae_fast.backends._forced
    first, second = vae_fast.use_backend("reference"), vae_fast.use_backend("cpp")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert vae_fast.backends.backend_for("cpu") == "cpp"
    second.__exit__(None, None, None)
    assert vae_fast.backends._forced == before


def test_a_context_that_cannot_be_entered_leaves_nothing(monkeypatch):
    def broken():
        raise ImportError("no Triton")

    before = vae_fast.backends._forced
    with monkeypatch.context() as m:
        m.setattr(vae_fast.backends, "_register_triton", lambda key: broken())
        m.setattr(vae_fast.backends, "why_not", lambda name, device: None)
        with pytest.raises(ImportError, match="no Triton"), vae_fast.use_backend("triton"):
            pass
    assert vae_fast.backends._forced == before


def test_a_forced_backend_is_for_all_threads():
    with vae_fast.use_backend("reference"):
        assert set(in_threads(lambda i: vae_fast.backends.backend_for("cpu"))) == {"reference"}
        reference = in_threads(lambda i: step(i))
    fused = [step(i) for i in range(THREADS)]
    for a, b in zip(reference, fused):
        for s, t in zip(a, b):
            torch.testing.assert_close(s, t, rtol=2e-4, atol=2e-4)


def test_backends_may_change_while_threads_compute():
    """Each call is served by one backend or the other."""
    truth = [step(i) for i in range(THREADS)]
    switching = threading.Event()

    def work(i):
        if i == 0:
            for _ in range(200):
                with vae_fast.use_backend("reference"):
                    pass
            return switching.set()
        results = [step(i)]
        while not switching.is_set():
            results.append(step(i))
        return results

    for i, results in enumerate(in_threads(work)[1:], 1):
        for result in results:
            for s, t in zip(result, truth[i]):
                torch.testing.assert_close(s, t, rtol=2e-4, atol=2e-4)


# ---- forked and spawned processes ---------------------------------------------------------------


def in_child(work, seconds=10):
    """What becomes of work() in a forked child, in which the parent's threads are missing."""
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process
            signal.alarm(seconds)
            os._exit(0 if work() else 3)
        except BaseException:
            os._exit(4)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "hangs" if os.WTERMSIG(status) == signal.SIGALRM else f"signal {os.WTERMSIG(status)}"
    return {0: "right", 3: "wrong"}.get(os.WEXITSTATUS(status), "raises")


def torchs_own(size):
    """A step of PyTorch's own kernels: of several threads, if it is large."""
    a = torch.full((64, size), 0.5, requires_grad=True)
    (a * a).sum().backward()
    return np.all(a.grad.numpy() == 1.0)


TRUTH = {}


def ours(size):
    """A step whose only large operations are this package's, against the reference."""
    data = np.random.default_rng(size).standard_normal((3, 64, size), dtype=np.float32)
    x, mean, s = map(torch.from_numpy, data)
    mean.requires_grad_(), s.requires_grad_()
    log = torch.zeros(64)
    vae_fast.fused_elbo(x, mean, s, log, log)[0].backward()
    found = [mean.grad.numpy(), s.grad.numpy()]
    if size not in TRUTH:
        m, r = (t.detach().clone().requires_grad_() for t in (mean, s))
        vae_fast.reference.gaussian_nll(x, m, r).mean().backward()
        TRUTH[size] = [m.grad.numpy(), r.grad.numpy()]
    return all(np.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(found, TRUTH[size]))


def one_thread(size):
    """As in a DataLoader's worker, which sets this before anything else."""
    torch.set_num_threads(1)
    return ours(size)


FORK = """
import test_concurrency as t
t.torch.set_num_threads({threads})
if {used}:
    assert all(t.torchs_own(n) and t.ours(n) for n in (20, 5000))
for size in 20, 5000:
    print(torchs := t.in_child(lambda: t.torchs_own(size)))
    print(t.in_child(lambda: t.ours(size)) if torchs == "right" else torchs)
    print(t.in_child(lambda: t.one_thread(size)))
"""


@needs_fork
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_forked_children(threads, used):
    """Right, but where PyTorch's own kernels hang, too, waiting for threads that OpenMP had in the
    parent. What is too small for several threads, or told to use one, is right even then.
    """
    torchs_small, small, small_alone, torchs_large, large, large_alone = python(
        FORK.format(threads=threads, used=used)
    )
    assert (torchs_small, small, small_alone, large_alone) == ("right",) * 4
    assert torchs_large in ("right", "hangs")
    assert large == torchs_large


class Samples(Dataset):
    """Items that workers compute with this package."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        key = torch.tensor([i, 0], dtype=torch.uint64)
        mu = torch.full((3, 50), float(i))
        z, log_q, log_p = vae_fast.reparameterize(mu, torch.zeros_like(mu), key=key)
        nll = vae_fast.gaussian_nll(z, mu, torch.zeros_like(mu))
        return z, log_q, log_p, nll


CONTEXTS = [c for c in ("fork", "spawn") if c in multiprocessing.get_all_start_methods()]


@pytest.mark.parametrize("context", CONTEXTS)
def test_dataloader_workers(context):
    """Workers that compute, beside a parent whose kernels have run in several threads."""
    step(0, size=5000)
    loader = DataLoader(Samples(), 4, num_workers=2, multiprocessing_context=context, timeout=100)
    found = [torch.cat(parts) for parts in zip(*loader)]
    serial = [torch.stack(parts) for parts in zip(*(Samples()[i] for i in range(12)))]
    assert same(found, serial)
    assert same(step(0), step(0))


def train(seed):
    torch.manual_seed(seed)
    vae = vae_fast.VAE.mlp((6,), latent_dim=2)
    vae(torch.rand(8, 6)).loss.backward()
    return [p.grad.numpy() for p in vae.parameters()]


def _train(seed, queue):
    queue.put(train(seed))


def test_spawned_processes():
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    worker = context.Process(target=_train, args=(3, queue))
    worker.start()
    found = queue.get()
    worker.join(60)
    assert worker.exitcode == 0
    for a, b in zip(found, train(3)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# ---- copies ------------------------------------------------------------------------------------

COPIES = {
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "deepcopy": copy.deepcopy,
    "torch.save": lambda m: _saved(m),
}


def _saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", COPIES)
def test_copies_of_modules(copied, key):
    prior = tuple(torch.nn.Parameter(torch.randn(3)) for _ in range(2))
    vae = vae_fast.VAE.mlp((6,), latent_dim=3, prior=prior, kl="analytic", likelihood="student_t")
    elbo = vae_fast.FusedELBO(num_samples=2, beta=0.3, likelihood_clamp=(-2, 2), reduction="sum")
    x = torch.rand(5, 6)
    vae(x).loss.backward()  # a copy is made of a used module, gradients and all
    other, loss = COPIES[copied](vae), COPIES[copied](elbo)
    assert torch.equal(other(x, key=key).loss, vae(x, key=key).loss)
    theirs, ours = ({id(p) for p in m.parameters()} for m in (other, vae))
    assert len(theirs) == len(ours)
    assert not theirs & ours
    mu = torch.randn(5, 3)
    args = (x, mu, mu, lambda z: (z.repeat(1, 2), z.repeat(1, 2)))
    assert torch.equal(loss(*args, key=key).loss, elbo(*args, key=key).loss)
    assert repr(loss) == repr(elbo)
