"""Keys and the reference noise stream.

Noise is a pure function of a key and a logical index: it equals what PyTorch's stateless generator
(``torch.func._random.normal``, Philox4x32-10) returns for that key, on every backend. A key
therefore gives the same latent sample on a CPU, on a GPU and in the reference, and nothing needs to
be stored for the backward pass. (Fresh keys come from the device's own generator, and differ.)

This module is the stream written in plain PyTorch. The kernels make the same numbers in registers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vae_fast import eager

__all__ = ["make_key", "normal", "uniform"]

# Philox4x32-10: round multipliers and Weyl key increments (Salmon et al. 2011, "Parallel random
# numbers: as easy as 1, 2, 3", section 3.3).
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF


def make_key(
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a fresh noise key from the device's random generator.

    One ordinary torch call on ``device``: no host synchronisation, reproducible through
    ``torch.manual_seed``, safe inside ``torch.compile`` and CUDA graphs.

    Args:
        device: where the key lives; defaults to the generator's device, else the CPU.
        generator: the generator to draw from; the device's default one if ``None``.

    Returns:
        A ``uint64`` tensor of shape ``(2,)``: (seed, offset).
    """
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            got = type(generator).__name__
            raise TypeError(f"generator must be a torch.Generator, got {got}")
        device = generator.device if device is None else device
    bits = torch.randint(
        -(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device, generator=generator
    )
    # The same bits, without a launch; but vmap takes no view as another dtype before torch 2.13.
    return bits.view(torch.uint64) if eager.suffices() else bits.to(torch.uint64)


def check_key(key: object) -> None:
    """Raise if ``key`` is not a ``uint64`` tensor of shape ``(2,)``."""
    if not isinstance(key, Tensor):
        got = type(key).__name__
        raise TypeError(f"key must be a torch.Tensor, got {got}: vae_fast.noise.make_key makes one")
    if key.dtype != torch.uint64 or key.shape != (2,):
        raise ValueError(
            "key must be a uint64 tensor of shape (2,), (seed, offset); "
            f"got {key.dtype} of shape {tuple(key.shape)}"
        )


def _mul_hi_lo(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a·m for 32-bit values held in int64.

    In two products of 48 bits, since one of 64 may overflow: code that torch.compile makes would
    have undefined behaviour then.
    """
    low, high = a * (m & 0xFFFF), a * (m >> 16)
    low = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (low >> 32), low & _MASK


def philox(key: Tensor, index: Tensor, stream: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on the counters (lo32, hi32 of ``index``, ``stream``, 0).

    Args:
        key: int64 0-dim tensor, the 64 bits of the seed.
        index: int64 tensor of any shape, 64-bit counters.
        stream: third counter word; streams of one key have no counter in common.

    Returns:
        Four int64 tensors of ``index``'s shape, each a 32-bit word.
    """
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    c0, c1 = index & _MASK, (index >> 32) & _MASK
    c2, c3 = torch.full_like(c0, stream), torch.zeros_like(c0)
    for _ in range(_ROUNDS):
        hi0, lo0 = _mul_hi_lo(c0, _MULTIPLIERS[0])
        hi1, lo1 = _mul_hi_lo(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _uniform(v: Tensor) -> Tensor:
    """fp32 uniform v·2⁻³² + 2⁻³³ on (0, 1], rounded once as a fused multiply-add rounds."""
    return (v.float().double() * 2.0**-32 + 2.0**-33).float()


def _uniform64(hi: Tensor, lo: Tensor) -> Tensor:
    """fp64 uniform hi·2⁻³² + (lo·2⁻⁶⁴ + 2⁻⁶⁵)."""
    return hi.double() * 2.0**-32 + (lo.double() * 2.0**-64 + 2.0**-65)


def _box_muller(u1: Tensor, u2: Tensor) -> tuple[Tensor, Tensor]:
    """Two normals from two uniforms (Box and Muller 1958)."""
    radius = torch.sqrt(-2.0 * torch.log(u1))
    angle = (2.0 * math.pi) * u2
    return radius * torch.cos(angle), radius * torch.sin(angle)


def normal(
    key: Tensor,
    batch: int,
    num_samples: int | None,
    latent_shape: Sequence[int],
    first_row: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The standard normal noise ε that every backend's latent pass uses for ``key``.

    Args:
        key: ``uint64`` tensor of shape (2,), (seed, offset), on the device wanted.
        batch: number of batch elements B.
        num_samples: number of samples K per batch element; ``None`` for one sample and no axis.
        latent_shape: event shape of the latent; its product is L.
        first_row: global index of the first batch element, so that a shard draws what the whole
            batch would have drawn.
        dtype: dtype of the latent tensors. ``float64`` has a stream of its own; ``float16`` and
            ``bfloat16`` use the fp32 stream, and the result stays fp32.

    Returns:
        ε of shape (K, B, *latent_shape), or (B, *latent_shape) for ``num_samples=None``; fp32, or
        fp64 for ``dtype=torch.float64``.
    """
    check_key(key)
    k = 1 if num_samples is None else num_samples
    size = math.prod(latent_shape)
    per_call = 2 if dtype == torch.float64 else 4
    calls = -(-size // per_call)
    bits = key.to(torch.int64)
    seed, offset = bits[0], bits[1]

    # Row r = (first_row + b)·K + k starts at counter offset + r·calls, modulo 2^64.
    b = torch.arange(batch, device=key.device, dtype=torch.int64)
    s = torch.arange(k, device=key.device, dtype=torch.int64)
    row = (b + first_row) * k + s[:, None]
    index = offset + row[..., None] * calls + torch.arange(calls, device=key.device)
    x, y, z, w = philox(seed, index)
    if dtype == torch.float64:
        lanes = _box_muller(_uniform64(x, y), _uniform64(z, w))
    else:
        lanes = (
            *_box_muller(_uniform(x), _uniform(y)),
            *_box_muller(_uniform(z), _uniform(w)),
        )
    eps = torch.stack(lanes, dim=-1).flatten(2)[..., :size]
    shape = (batch, *latent_shape) if num_samples is None else (k, batch, *latent_shape)
    return eps.reshape(shape)


def uniform(key: Tensor, batch: int, event_shape: Sequence[int], first_row: int = 0) -> Tensor:
    """The uniform noise on (0, 1] that dequantizes data, a stream apart from ``normal``'s.

    Row r = first_row + b of D elements takes ceil(D/4) Philox calls from counter offset + r·calls
    on, in stream 1: u = v·2⁻³² + 2⁻³³ of each 32-bit word v, in fp32.

    Args:
        key: ``uint64`` tensor of shape (2,), (seed, offset).
        batch: number of rows B.
        event_shape: shape of a row.
        first_row: global index of the first row.

    Returns:
        u of shape (B, *event_shape), fp32.
    """
    check_key(key)
    size = math.prod(event_shape)
    calls = -(-size // 4)
    bits = key.to(torch.int64)
    row = torch.arange(batch, device=key.device, dtype=torch.int64) + first_row
    index = bits[1] + row[:, None] * calls + torch.arange(calls, device=key.device)
    words = torch.stack(philox(bits[0], index, stream=1), dim=-1)
    return _uniform(words.flatten(1)[:, :size]).reshape(batch, *event_shape)
