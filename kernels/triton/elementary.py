"""Elementary functions that Triton lacks without libdevice, or has only approximately."""

import math
import struct

import triton
import triton.language as tl

# Codes of ``APPROX``: whether PTX's approximate functions are used, which only NVIDIA has, and
# whether results need be as exact as fp32 numbers, or as what is made of numbers of 16 bits.
PLAIN, FP32, FP16 = map(tl.constexpr, range(3))


def _bits(value: float) -> str:
    """An fp32 constant of PTX."""
    return "0f" + struct.pack(">f", value).hex()


def _exp_ptx(scale: float) -> str:
    """PTX of e^(scale·x) for ± a power of two ``scale``: to 3e-7, any x, beside ex2's own 2 ulp.

    e^(scale·x) = 2^m (1 + d), where m is scale·x·log2 e rounded, and d what that lost: left out, it
    would grow with |x|. m is kept a little beside that, so that d/scale is positive where it
    counts, and saturation keeps it finite where x is infinite or huge. At x = 0 both factors are
    fp32 numbers.
    """
    beside = math.log2(1.0 - math.copysign(2.0**-16, scale))
    return f"""{{
    .reg .f32 m, d;
    fma.rn.f32 m, $1, {_bits(scale / math.log(2.0))}, {_bits(beside)};
    fma.rn.sat.f32 d, m, {_bits(-math.log(2.0) / scale)}, $1;
    fma.rn.f32 d, d, {_bits(scale)}, {_bits(1.0)};
    ex2.approx.ftz.f32 m, m;
    mul.f32 $0, m, d;
    }}"""


def _exp_ptx_16(scale: float) -> str:
    """The same in two instructions instead of five: d is left out.

    That is |scale·x|·2^-23 of the result at most. An x made of 16-bit numbers was rounded by more
    than a thousand times as much: by 2^-9 of itself in bf16, 2^-12 in fp16.
    """
    return f"""{{
    .reg .f32 m;
    mul.f32 m, $1, {_bits(scale / math.log(2.0))};
    ex2.approx.ftz.f32 $0, m;
    }}"""


_EXP, _EXP_16 = tl.constexpr(_exp_ptx(1.0)), tl.constexpr(_exp_ptx_16(1.0))
_EXP_HALF, _EXP_HALF_16 = tl.constexpr(_exp_ptx(0.5)), tl.constexpr(_exp_ptx_16(0.5))
_EXP_QUARTER, _EXP_QUARTER_16 = tl.constexpr(_exp_ptx(-0.25)), tl.constexpr(_exp_ptx_16(-0.25))


@triton.jit
def minus_zeros(SHAPE: tl.constexpr, DTYPE: tl.constexpr):
    """-0.0, from which a sum starts at no cost: adding 0.0 changes -0.0, so it must be done.

    ``tl.full`` makes 0.0 of it.
    """
    return tl.zeros(SHAPE, DTYPE) * -1.0


@triton.jit
def widen(x, DTYPE: tl.constexpr, APPROX: tl.constexpr):
    """``x`` in the dtype that is computed in.

    A bf16 number is the upper half of the same fp32 number, so one instruction makes it; left to
    itself, LLVM takes the second of two neighbours apart first.
    """
    if APPROX and x.dtype == tl.bfloat16:
        bits = tl.inline_asm_elementwise(
            "{ .reg .b16 zero; mov.b16 zero, 0; mov.b32 $0, {zero, $1}; }",
            "=r,h",
            [x.to(tl.uint16, bitcast=True)],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def ptx(ASM: tl.constexpr, x):
    """What PTX makes of fp32 ``x``, $1, in $0; NVIDIA only."""
    return tl.inline_asm_elementwise(ASM, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _exp(x, SCALE: tl.constexpr, PTX32: tl.constexpr, PTX16: tl.constexpr, APPROX: tl.constexpr):
    """e^(SCALE·x)."""
    if APPROX == FP16:
        return ptx(PTX16, x)
    elif APPROX == FP32:
        return ptx(PTX32, x)
    else:
        return tl.exp(SCALE * x)


@triton.jit
def exp(x, APPROX: tl.constexpr):
    """e^x."""
    return _exp(x, 1.0, _EXP, _EXP_16, APPROX)


@triton.jit
def exp_half(x, APPROX: tl.constexpr):
    """e^(x/2)."""
    return _exp(x, 0.5, _EXP_HALF, _EXP_HALF_16, APPROX)


@triton.jit
def exp_minus_quarter(x, APPROX: tl.constexpr):
    """e^(-x/4)."""
    return _exp(x, -0.25, _EXP_QUARTER, _EXP_QUARTER_16, APPROX)


@triton.jit
def reciprocal(x, APPROX: tl.constexpr):
    """1/x, subnormal numbers on either side taken for zero."""
    if APPROX:
        return ptx("rcp.approx.ftz.f32 $0, $1;", x)
    else:
        return 1.0 / x


@triton.jit
def log1p(y, APPROX: tl.constexpr):
    """log(1 + y) for a finite y >= 0, to full precision.

    What the sum was rounded by is added to first order.
    """
    u = 1.0 + y
    return tl.log(u) + (y - (u - 1.0)) * reciprocal(u, APPROX)


@triton.jit
def log1p_unit(y, APPROX: tl.constexpr):
    """log(1 + y) for 0 <= y <= 1, to full precision."""
    if y.dtype == tl.float64:
        return log1p(y, APPROX)
    else:
        # A minimax polynomial of degree 8 for (log(1 + y) - y)/y², to 5e-9, summed in pairs.
        y2 = y * y
        p01, p23 = 0.33330464 * y - 0.4999993, 0.19692102 * y - 0.24958019
        p45, p67 = 0.10661128 * y - 0.1534488, 0.020086242 * y - 0.05745723
        p = ((p67 - 0.0032904686 * y2) * y2 + p45) * (y2 * y2) + (p23 * y2 + p01)
        return y2 * p + y


@triton.jit
def exp_rest(t):
    """(e^t - 1 - t)/t² for |t| <= ½, from its series ½ + t/3! + t²/4! + ..."""
    p = tl.full(t.shape, 1.0 / 362880, t.dtype)
    if t.dtype == tl.float64:
        p = p + t * (1.0 / 3628800 + t * (1.0 / 39916800 + t * (1.0 / 479001600 + t * (
            1.0 / 6227020800 + t * (1.0 / 87178291200 + t * (1.0 / 1307674368000))))))  # fmt: skip
    p = 1.0 / 720 + t * (1.0 / 5040 + t * (1.0 / 40320 + t * p))
    return 0.5 + t * (1.0 / 6 + t * (1.0 / 24 + t * (1.0 / 120 + t * p)))


@triton.jit
def expm1_and_rest(t, APPROX: tl.constexpr):
    """e^t - 1, and e^t - 1 - t, to full precision; both cancel near zero."""
    near = tl.abs(t) < 0.5
    rest = t * t * exp_rest(t)
    expm1 = exp(t, APPROX) - 1.0
    return tl.where(near, t + rest, expm1), tl.where(near, rest, expm1 - t)


@triton.jit
def sigmoid(x, APPROX: tl.constexpr):
    """1/(1 + e^-x)."""
    y = exp(-tl.abs(x), APPROX)
    return tl.where(x < 0.0, y, 1.0) * reciprocal(1.0 + y, APPROX)


@triton.jit
def tanh(x, APPROX: tl.constexpr):
    """The hyperbolic tangent, to full precision."""
    expm1, _ = expm1_and_rest(-2.0 * tl.abs(x), APPROX)
    y = -expm1 * reciprocal(2.0 + expm1, APPROX)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def tanh_slope(x, APPROX: tl.constexpr):
    """1 - tanh² x, without its cancellation."""
    y = exp(-2.0 * tl.abs(x), APPROX)
    return 4.0 * y * reciprocal((1.0 + y) * (1.0 + y), APPROX)
