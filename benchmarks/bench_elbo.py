"""The whole loss given decoder outputs: vae_fast against what people use instead.

    pytest benchmarks --benchmark-only

All implementations run in this process on the same tensors, each drawing its own noise inside its
time. A result that is wrong fails before it is timed. The table at the end gives, per size, the
ratio to the best peer and the share of this machine's measured copy bandwidth.
"""

from __future__ import annotations

import pytest
import torch
from peers import IMPLEMENTATIONS, Case

# (batch, latent, data) and rounds: a small MLP, a common batch, and one far larger than caches.
SIZES = {(64, 16, 784): 400, (1024, 64, 784): 80, (4096, 128, 3072): 7}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("phase", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "B{} L{} D{}".format(*s))
def test_elbo(benchmark, record_row, size, dtype, phase, implementation):
    if implementation == "vae_fast inplace" and phase == "forward":
        pytest.skip("without gradients nothing is written in place")
    torch._dynamo.reset()
    case = Case(*size, DTYPES[dtype])
    loss = IMPLEMENTATIONS[implementation]()
    step = case.forward if phase == "forward" else case.forward_backward
    case.check(loss, phase)

    benchmark.group = f"elbo {phase} {dtype} B{size[0]} L{size[1]} D{size[2]}"
    benchmark.pedantic(step, (loss,), setup=case.reset, rounds=SIZES[size], warmup_rounds=3)
    record_row(implementation, case.bytes_moved(phase), lambda: step(loss), case.reset)
