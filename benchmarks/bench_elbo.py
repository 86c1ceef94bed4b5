"""The whole loss given decoder outputs: vae_fast against what people use instead.

    pytest benchmarks --benchmark-only

All implementations run in this process on the same tensors, each drawing its own noise inside its
time, and take turns of some rounds each, so that whatever else the machine does slows all of them.
A result that is wrong fails before it is timed. The table at the end gives, per size, the ratio to
the best peer and the share of this machine's measured copy bandwidth.
"""

from __future__ import annotations

import time
from functools import lru_cache

import pytest
import torch
from peers import IMPLEMENTATIONS, Case

# (batch, latent, data) and rounds: a small MLP, a common batch, and one far larger than caches.
SIZES = {(64, 16, 784): 600, (1024, 64, 784): 150, (4096, 128, 3072): 12}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TURNS, WARM_UP = 6, 2  # rounds at the start of a turn that are not timed


@lru_cache(maxsize=1)
def measured(size, dtype, phase, timed):
    """The case, its steps, and the seconds of each implementation's rounds."""
    torch._dynamo.reset()
    case = Case(*size, DTYPES[dtype])
    run = case.forward if phase == "forward" else case.forward_backward
    losses = {
        name: make()
        for name, make in IMPLEMENTATIONS.items()
        if phase != "forward" or name != "vae_fast inplace"  # without gradients nothing is written
    }
    for loss in losses.values():
        case.check(loss, phase)
    seconds = {name: [] for name in losses}
    for _ in range(TURNS if timed else 0):
        for name, loss in losses.items():
            for number in range(-WARM_UP, SIZES[size] // TURNS):
                case.reset()
                start = time.perf_counter()
                run(loss)
                elapsed = time.perf_counter() - start
                if number >= 0:
                    seconds[name].append(elapsed)
    steps = {name: (lambda loss=loss: run(loss)) for name, loss in losses.items()}
    return case, steps, seconds


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("phase", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "B{} L{} D{}".format(*s))
def test_elbo(benchmark, submit, record_row, size, dtype, phase, implementation):
    case, steps, seconds = measured(size, dtype, phase, timed=not benchmark.disabled)
    if implementation not in steps:
        pytest.skip("without gradients nothing is written in place")
    benchmark.group = f"elbo {phase} {dtype} B{size[0]} L{size[1]} D{size[2]}"
    submit(seconds[implementation])
    record_row(implementation, case.bytes_moved(phase), steps[implementation], case.reset)
