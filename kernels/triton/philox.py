"""PyTorch's stateless noise stream in registers: Philox4x32-10, then Box-Muller for normals.

The formulas are those of ``vae_fast/noise.py``. All four words of a Philox call are used, and
a thread makes whole calls for neighbouring elements, so the noise never leaves its registers.
"""

import triton
import triton.language as tl

from .elementary import minus_zeros, ptx

# Round multipliers and Weyl key increments (Salmon et al. 2011, section 3.3).
_M0 = tl.constexpr(0xD2511F53)
_M1 = tl.constexpr(0xCD9E8D57)
_W0 = tl.constexpr(0x9E3779B9)
_W1 = tl.constexpr(0xBB67AE85)

_2POW_M32 = tl.constexpr(2.0**-32)
_2POW_M33 = tl.constexpr(2.0**-33)
_2POW_M64 = tl.constexpr(2.0**-64)
_2POW_M65 = tl.constexpr(2.0**-65)
_2PI = tl.constexpr(6.283185307179586)
_2PI_2POW_M32 = tl.constexpr(6.283185307179586 * 2.0**-32)
_MINUS_2LN2 = tl.constexpr(-1.3862943611198906)


@triton.jit
def _mul_wide(a, M: tl.constexpr, APPROX: tl.constexpr):
    """High and low word of a·M, in one instruction; left to itself LLVM often makes it three."""
    if APPROX:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 p; mul.wide.u32 p, $2, $3; mov.b64 {$1, $0}, p; }",
            "=r,=r,r,r",
            [a, tl.full((), M, tl.uint32)],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    else:
        product = a.to(tl.uint64) * M
        return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox(seed, index, APPROX: tl.constexpr, STREAM: tl.constexpr = 0):
    """Four uint32 words of Philox4x32-10 for the counter (``index``, STREAM), a uint64 and 0 or 1.

    Streams of one key have no counter in common.
    """
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    # The first of ten rounds starts from c2 = STREAM and c3 = 0: one product is known, and has no
    # high word.
    hi0, c3 = _mul_wide(c0, _M0, APPROX)
    c0, c2 = c1 ^ k0, hi0 ^ k1
    c1 = tl.full(c0.shape, STREAM * _M1, tl.uint32)
    for _ in tl.static_range(9):
        k0, k1 = k0 + _W0, k1 + _W1
        hi0, lo0 = _mul_wide(c0, _M0, APPROX)
        hi1, lo1 = _mul_wide(c2, _M1, APPROX)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
    return c0, c1, c2, c3


@triton.jit
def _squared_radius(x, APPROX: tl.constexpr):
    """-2 ln u of a uint32 word: the sum of squares of the two normals made from it."""
    u = x.to(tl.float32) * _2POW_M32 + _2POW_M33
    if APPROX:
        # lg2.approx is good to 2^-22 absolute, too coarse under a square root near u = 1. There
        # 1 - u is exact, and -2 ln u = 2 (1 - u) to second order.
        log2 = ptx("lg2.approx.ftz.f32 $0, $1;", u)
        return tl.where(u > 1.0 - 2.0**-11, 2.0 - 2.0 * u, log2 * _MINUS_2LN2)
    else:
        return -2.0 * tl.log(u)


@triton.jit
def _box_muller(x, y, APPROX: tl.constexpr):
    """Two fp32 normals from two uint32 words."""
    square = _squared_radius(x, APPROX)
    if APPROX:
        # Within 1.5e-5 of PyTorch's: 5e-6 are sine and cosine, good to 2^-20.5, and 6e-6 what the
        # two angles are rounded by.
        radius = ptx("sqrt.approx.ftz.f32 $0, $1;", square)
        # The word taken as signed is the same angle reduced to [-pi, pi], where sin.approx is best;
        # the half step that PyTorch adds to it is worth 5e-9.
        angle = y.to(tl.int32, bitcast=True).to(tl.float32) * _2PI_2POW_M32
        cos = ptx("cos.approx.ftz.f32 $0, $1;", angle)
        sin = ptx("sin.approx.ftz.f32 $0, $1;", angle)
    else:
        radius = tl.sqrt(square)
        angle = (y.to(tl.float32) * _2POW_M32 + _2POW_M33) * _2PI
        cos, sin = tl.cos(angle), tl.sin(angle)
    return radius * cos, radius * sin


@triton.jit
def _box_muller64(x, y, z, w):
    """Two fp64 normals from four uint32 words, and the sum of their squares."""
    u1 = x.to(tl.float64) * _2POW_M32 + (y.to(tl.float64) * _2POW_M64 + _2POW_M65)
    u2 = z.to(tl.float64) * _2POW_M32 + (w.to(tl.float64) * _2POW_M64 + _2POW_M65)
    square = -2.0 * tl.log(u1)
    radius = tl.sqrt(square)
    angle = u2 * tl.full((), _2PI, tl.float64)
    return radius * tl.cos(angle), radius * tl.sin(angle), square


@triton.jit
def _normal4(seed, index, APPROX: tl.constexpr):
    """Four fp32 normals a call, and the sums of squares of either pair."""
    x, y, z, w = philox(seed, index, APPROX)
    n0, n1 = _box_muller(x, y, APPROX)
    n2, n3 = _box_muller(z, w, APPROX)
    return n0, n1, n2, n3, _squared_radius(x, APPROX), _squared_radius(z, APPROX)


@triton.jit
def _interleave(n0, n1, n2, n3):
    """Neighbours along a new last dimension, in two steps [..., 2, 2]."""
    return tl.join(tl.join(n0, n2), tl.join(n1, n3))


@triton.jit
def normal(seed, index, VEC: tl.constexpr, FP64: tl.constexpr, APPROX: tl.constexpr):
    """ε for a tile, its last dimension VEC times that of ``index``, and a tile that sums to Σ ε².

    A thread holds VEC neighbouring elements of a tile (2 in fp64, 4 or 8 in fp32) and makes their
    noise itself, so the joins below move nothing between threads. ``index`` is the uint64 Philox
    counter of the first call that those elements take, [rows, cols / VEC]. A pair's ε² sum to its
    radius squared, which stands at the first of them; the other has -0.0, which costs no addition.
    """
    if FP64:
        tl.static_assert(VEC == 2)
        x, y, z, w = philox(seed, index, APPROX)
        n0, n1, s0 = _box_muller64(x, y, z, w)
        eps = tl.join(n0, n1)
        squares = tl.join(s0, minus_zeros(s0.shape, s0.dtype))
    elif VEC == 4:
        n0, n1, n2, n3, s0, s2 = _normal4(seed, index, APPROX)
        nil = minus_zeros(s0.shape, s0.dtype)
        eps = _interleave(n0, n1, n2, n3)
        squares = _interleave(s0, nil, s2, nil)
    else:
        tl.static_assert(VEC == 8)
        n0, n1, n2, n3, s0, s2 = _normal4(seed, index, APPROX)
        m0, m1, m2, m3, t0, t2 = _normal4(seed, index + 1, APPROX)
        nil = minus_zeros((s0.shape[0], s0.shape[1], 2), s0.dtype)
        eps = _interleave(tl.join(n0, m0), tl.join(n1, m1), tl.join(n2, m2), tl.join(n3, m3))
        squares = _interleave(tl.join(s0, t0), nil, tl.join(s2, t2), nil)
    shape: tl.constexpr = (index.shape[0], index.shape[1] * VEC)
    return tl.reshape(eps, shape), tl.reshape(squares, shape)


@triton.jit
def _uniform4(seed, index, APPROX: tl.constexpr):
    """Four fp32 uniforms on (0, 1] a call, of the stream that is not ``normal``'s."""
    x, y, z, w = philox(seed, index, APPROX, STREAM=1)
    return (
        x.to(tl.float32) * _2POW_M32 + _2POW_M33,
        y.to(tl.float32) * _2POW_M32 + _2POW_M33,
        z.to(tl.float32) * _2POW_M32 + _2POW_M33,
        w.to(tl.float32) * _2POW_M32 + _2POW_M33,
    )


@triton.jit
def uniform(seed, index, VEC: tl.constexpr, APPROX: tl.constexpr):
    """Uniform noise for a tile, laid out as that of ``normal``, for a VEC of 4 or 8."""
    u0, u1, u2, u3 = _uniform4(seed, index, APPROX)
    if VEC == 4:
        u = _interleave(u0, u1, u2, u3)
    else:
        tl.static_assert(VEC == 8)
        v0, v1, v2, v3 = _uniform4(seed, index + 1, APPROX)
        u = _interleave(tl.join(u0, v0), tl.join(u1, v1), tl.join(u2, v2), tl.join(u3, v3))
    return tl.reshape(u, (index.shape[0], index.shape[1] * VEC))
