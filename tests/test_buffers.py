"""Reused output memory: handed out again only when nobody can see it any more."""

import threading

import pytest
import torch

import vae_fast
from vae_fast import buffers, eager


@pytest.fixture(autouse=True)
def _empty():
    buffers.clear()
    yield
    buffers.clear()


def like(n=buffers.SMALLEST):
    return torch.empty(n)


def test_memory_is_reused_once_it_is_free():
    t = like()
    first = buffers.empty_like(t)
    address = first.data_ptr()
    del first
    assert buffers.empty_like(t).data_ptr() == address


@pytest.mark.parametrize(
    "hold",
    [
        lambda t: t,
        lambda t: t[5:],
        lambda t: t.detach(),
        lambda t: t.numpy(),
        lambda t: t.untyped_storage(),
        lambda t: torch.nn.Parameter(t),
        lambda t: memoryview(t.numpy()),
    ],
)
def test_memory_that_somebody_holds_is_not_reused(hold):
    t = like()
    first = buffers.empty_like(t)
    address, held = first.data_ptr(), hold(first)
    del first
    assert buffers.empty_like(t).data_ptr() != address
    del held


def test_memory_that_somebody_gave_back_is_not_handed_out():
    t = like()
    first = buffers.empty_like(t)
    first.untyped_storage().resize_(0)
    del first
    second = buffers.empty_like(t)
    assert second.untyped_storage().nbytes() == second.nbytes


def test_memory_that_another_process_may_see_is_not_reused():
    t = like()
    buffers.empty_like(t).share_memory_()
    assert not buffers.empty_like(t).is_shared()


def test_memory_of_inference_mode_is_not_kept():
    """A later step could not differentiate it."""
    t = like()
    with torch.inference_mode():
        buffers.empty_like(t)
    assert not buffers.empty_like(t).is_inference()


def test_gradients_of_two_steps_do_not_share_memory():
    x, log = torch.randn(64, 1024), torch.zeros(64)
    steps = []
    for i in range(4):
        mean, s = (torch.full((64, 1024), 0.1 * i, requires_grad=True) for _ in range(2))
        loss, _ = vae_fast.fused_elbo(x, mean, s, log, log)
        loss.backward()
        steps.append((mean, s, mean.grad.clone(), s.grad.clone()))
    for mean, s, g_mean, g_s in steps:
        assert torch.equal(mean.grad, g_mean)
        assert torch.equal(s.grad, g_s)


def test_what_is_kept_is_bounded():
    for n in range(20):
        buffers.empty_like(like(buffers.SMALLEST + n))
    assert len(buffers._kept) == buffers.MOST


def test_a_step_does_not_drive_its_own_buffers_out():
    """All of the loss's gradients, and those of the step before, which a loop may still hold."""
    if eager.shortcut() is None:
        pytest.skip("without the C++ library for eager calls only the data's gradients are kept")
    rows, latent, data = 1 << 10, 1 << 9, 600
    elbo = vae_fast.FusedELBO(kl="analytic")
    x, one = torch.rand(rows, data), torch.ones(())
    latents = [torch.randn(rows, latent, requires_grad=True) for _ in range(4)]
    decoded = [torch.randn(rows, data, requires_grad=True) for _ in range(2)]
    seen, out = [], None
    for _ in range(6):
        means = [t * one for t in decoded]
        out = elbo(x, *latents[:2], lambda z, means=means: means, prior=tuple(latents[2:]))
        inputs = *latents, *means
        gradients = torch.autograd.grad(out.loss, inputs)
        assert all(g.nbytes > buffers.SMALLEST for g in gradients)
        seen.append({g.data_ptr() for g in gradients})
        del gradients
    before = set().union(*seen[:3])
    assert len(before) <= buffers.MOST
    assert set().union(*seen[3:]) <= before


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, :600],
        lambda t: t.chunk(2, dim=1)[1],
        lambda t: t[:600].t(),
        lambda t: t[:1].expand(600, -1),
    ],
    ids=["wider rows", "half", "transposed", "one row"],
)
def test_gradients_of_large_latents_of_any_layout(view):
    packed = torch.randn(1200, 1200)
    mu, scale = (view(t).requires_grad_() for t in (packed, packed.flip(0)))
    key = torch.tensor([1, 2], dtype=torch.uint64)

    def gradients():
        z, log_q, log_p = vae_fast.reparameterize(mu, scale, key=key)
        loss = (z * z.detach().sin()).sum() + (log_q - 2 * log_p).sum()
        return torch.autograd.grad(loss + vae_fast.gaussian_kl(mu, scale).sum(), (mu, scale))

    with vae_fast.use_backend("reference"):
        want = gradients()
    for _ in range(2):
        got = gradients()
        assert all(g.nbytes > buffers.SMALLEST for g in got)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_small_tensors_are_left_to_pytorch():
    buffers.empty_like(like(8))
    assert not buffers._kept


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t,
        lambda t: t.chunk(2, dim=1)[1],
        lambda t: t.transpose(1, 3),
        lambda t: t[:, :, ::2],
        lambda t: t[:1].expand(8, -1, -1, -1),
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.to(memory_format=torch.channels_last)[:, :8],
    ],
)
def test_layout_and_dtype_are_those_of_empty_like(view):
    t = view(torch.empty(8, 16, 64, 128, dtype=torch.bfloat16))
    want = torch.empty_like(t)
    addresses = set()
    for _ in range(2):
        out = buffers.empty_like(t)
        assert (out.shape, out.stride(), out.dtype) == (want.shape, want.stride(), want.dtype)
        addresses.add(out.data_ptr())
        del out
    assert len(addresses) == len(buffers._kept) == 1


def test_threads_never_share_a_buffer():
    t, clashes = like(), []

    def work(mark):
        for _ in range(300):
            out = buffers.empty_like(t)
            out.fill_(mark)
            if not torch.all(out == mark):
                clashes.append(mark)

    threads = [threading.Thread(target=work, args=(m,)) for m in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes
