"""How wrong a result may be: as wrong as eager PyTorch itself, against an fp64 truth."""

import torch


def error(value, truth):
    return (value.double().cpu() - truth.double().cpu()).abs().max().item() if truth.numel() else 0.0


def assert_accurate(ours, eager, truth, dtype):
    """The rule of the project: twice eager's own error plus 1e-6 relative in fp32; eager's own
    error in half precision; 1e-12 relative in fp64."""
    names = "results and gradients"
    assert len(ours) == len(eager) == len(truth)
    for i, (o, e, t) in enumerate(zip(ours, eager, truth)):
        assert o.shape == t.shape, f"{names}[{i}]: {tuple(o.shape)} != {tuple(t.shape)}"
        scale = max(t.abs().max().item(), 1e-30) if t.numel() else 1.0
        if dtype == torch.float64:
            bound = 1e-12 * scale
        elif dtype == torch.float32:
            bound = 2 * error(e, t) + 1e-6 * scale
        else:
            bound = error(e, t) + 1e-6 * scale
        assert error(o, t) <= bound, (
            f"{names}[{i}]: error {error(o, t):.3g} > {bound:.3g} ({dtype})"
        )
