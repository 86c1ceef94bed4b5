"""Random launches on a GPU that is not there, each compared with what Triton itself would launch.

A driver that launches nothing stands for the GPU, and a compiler that compiles nothing for
Triton's: what is checked is which kernel is chosen, and with which arguments. Run as a script, for
Triton must be imported without its interpreter. The results of the launches are never looked at.
"""

import os
import random
import sys
from collections import Counter

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from vae_fast._triton import importance, kl, latent, launch, likelihood

import vae_fast

# From here on the kernels are made, and the package may believe that they run on the CPU.
os.environ["TRITON_INTERPRET"] = "1"

KERNELS = (
    *(latent.latent_forward_kernel, latent.latent_backward_kernel),
    *(likelihood.likelihood_kernel, likelihood.rescale_kernel),
    *(kl.kl_forward_kernel, kl.kl_backward_kernel, importance.importance_kernel),
)
launched = []  # (compiled kernel, grid, arguments)
searches = Counter()  # of Triton's own, by kernel


class Driver:
    """A GPU of which only the name is known."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class Compiled(CompiledKernel):
    """Known by what it would have been compiled from."""

    def __init__(self, source, target, options):
        self.src, self.name = source, source.name
        self.module, self.function, self.packed_metadata = True, None, None
        self._run = self._launch

    def _launch(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        launched.append((self, (x, y, z), args))


def watch():
    """Compare every launch of the package with Triton's choice for the same arguments."""
    triton.runtime.driver.set_active(Driver())
    triton.compiler.compile = Compiled
    for kernel in KERNELS:

        def search(*args, run=kernel.run, name=kernel.__name__, **kwargs):
            searches[name] += 1
            return run(*args, **kwargs)

        kernel.run = search
    plain = launch.Launch.__call__

    def checked(self, kernel, tensors, *values):
        del launched[:]
        plain(self, kernel, tensors, *values)
        before = searches.copy()
        arguments = *tensors, *self.sizes, *values
        kernel[self.grid](*arguments, **self.constants, **self.options)
        searches.clear()
        searches.update(before)
        (ours, our_grid, our_arguments), (theirs, grid, arguments) = launched
        assert ours is theirs, (kernel, ours.src.signature, theirs.src.signature)
        assert our_grid == grid
        assert len(our_arguments) == len(arguments) == len(kernel.arg_names)
        for name, got, want in zip(kernel.arg_names, our_arguments, arguments, strict=True):
            assert got is want or got == want, (kernel, name, got, want)

    launch.Launch.__call__ = checked


def tensor(rng, *shape, dtype=torch.float32):
    """Zeros in one of the ways that tensors lie in memory, at any address."""
    way = rng.randrange(4)
    if way == 0 or len(shape) < 2:
        return torch.zeros(shape, dtype=dtype)
    if way == 1:  # half of a packed tensor
        whole = torch.zeros(shape[0], 2 * shape[1], *shape[2:], dtype=dtype)
        return whole.chunk(2, 1)[rng.randrange(2)]
    if way == 2:
        return torch.zeros(*shape[1:], shape[0], dtype=dtype).movedim(-1, 0)
    return torch.zeros(shape[0], *(n + 1 for n in shape[1:]), dtype=dtype)[
        (slice(None), *(slice(1, None) for _ in shape[1:]))
    ]


def step(rng):
    """A training step with random options, of one of a few sizes."""
    batch, samples = rng.choice([1, 2, 16]), rng.choice([1, 1, 3])
    size, latent_size = rng.choice([(1,), (5,), (64,), (2, 4, 4)]), rng.choice([1, 3, 16])
    dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64])
    mu, scale = (tensor(rng, batch, latent_size, dtype=dtype) for _ in range(2))
    scale = rng.choice([scale, scale, torch.zeros((), dtype=dtype)])
    levels = dtype != torch.float64 and rng.random() < 0.2
    x = tensor(rng, batch, *size, dtype=torch.uint8 if levels else dtype)
    mean = tensor(rng, samples * batch, *size, dtype=dtype)
    shape = rng.choice([mean.shape, mean.shape, (), (1, *size), (len(mean), *(1 for _ in size))])
    results = [mean, tensor(rng, *shape, dtype=dtype)]
    if rng.random() < 0.2:
        results = [torch.zeros(len(mean), 2 * size[0], *size[1:], dtype=dtype)]
    leaves = [t.detach().requires_grad_() for t in (mu, scale, *results)]
    mu, scale, *results = leaves
    elbo = vae_fast.FusedELBO(
        num_samples=samples,
        reduction=rng.choice(["mean", "sum", "none"]),
        kl=rng.choice(["monte_carlo", "monte_carlo", "analytic"]),
        likelihood=rng.choice(["gaussian", "gaussian", "laplace", "student_t"]),
        likelihood_clamp=rng.choice([None, (-7.0, 7.0)]),
        dequantize=levels and rng.random() < 0.5,
    )
    mask = rng.choice([None, None, torch.ones(x.shape, dtype=torch.bool)])
    first_row = rng.choice([0, 1, 16, 5, 2**31, 2**40 + 1])
    key = torch.zeros(4, dtype=torch.uint64)[rng.choice([slice(2), slice(1, 3), slice(0, 3, 2)])]

    def decoder(z):
        return results[0] if len(results) == 1 else tuple(results)

    out = elbo(x, mu, scale, decoder, first_row=first_row, mask=mask, key=key)
    (rng.choice([1.0, 2.0]) * out.loss.sum()).backward()
    if samples > 1:
        vae_fast.importance_bound(*(tensor(rng, samples, batch) for _ in range(3)))


def main():
    rng = random.Random(int(sys.argv[1]))
    watch()
    with vae_fast.use_backend("triton"):
        for _ in range(int(sys.argv[2])):
            step(rng)
        # Of one case, what is new at the second time is asked for at most.
        counts = []
        for _ in range(3):
            searches.clear()
            x, mean, logvar = (torch.zeros(8, 64) for _ in range(3))
            mu, scale = torch.zeros(8, 20).chunk(2, 1)  # the second begins at no multiple of 16
            leaves = [t.detach().requires_grad_() for t in (mu, scale, mean, logvar)]
            elbo = vae_fast.FusedELBO()
            elbo(x, mu, scale, lambda z, two=leaves[2:]: tuple(two)).loss.backward()
            counts.append(sum(searches.values()))
    assert counts[1:] == [0, 0], counts
    sys.stdout.write("all launches are Triton's\n")


if __name__ == "__main__":
    main()
