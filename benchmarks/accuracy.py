"""How far PTX's approximate functions may lead the kernels astray, with no GPU.

    TRITON_INTERPRET=1 python -m benchmarks.accuracy

The kernels' own device functions run in Triton's interpreter, which is taught the PTX that they
hold. Each approximate function gives the exact value moved by its documented error, up or down: of
all combinations of functions the worst counts, and of some draws of a way for every single value,
since what errs one way throughout may cancel.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import re
import struct
import sys
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from vae_fast._triton.elementary import FP16, FP32, PLAIN, expm1_and_rest
from vae_fast._triton.family import element_gradients, element_nll
from vae_fast._triton.philox import _box_muller
from vae_fast._triton.scale import (
    exponential_root,
    log_scale_slope,
    log_variance_and_root,
    log_variance_and_scale,
)

from vae_fast import noise
from vae_fast.reference import student_t_constant

# Documented maximum errors: the PTX ISA manual's; of logf, which is no single instruction, the CUDA
# programming guide's. "ulp" is counted from the correctly rounded result.
DOCUMENTED = {
    "ex2.approx.ftz.f32": "2 ulp",
    "lg2.approx.ftz.f32": "2^-22 absolute within (0.5, 2), else relative",
    "sqrt.approx.ftz.f32": "2^-23 relative",
    "rsqrt.approx.ftz.f32": "2^-22.9 relative",
    "rcp.approx.ftz.f32": "1 ulp",
    "sin.approx.ftz.f32": "2^-20.5 absolute",
    "cos.approx.ftz.f32": "2^-20.5 absolute",
    "div.full.f32": "2 ulp",
    "logf": "1 ulp",
}
PARAMS = ("logvar", "logstd", "std", "var", "softplus")
LIKELIHOODS = ("gaussian", "laplace", "bernoulli", "logistic", "student_t")
DF, LEVEL = 4.0, 1.0 / 255.0
BLOCK = 1 << 12
DRAWS = 8


# ---- the kernels' functions, each in a kernel of its own ---------------------------------------


@triton.jit
def noise_kernel(x_ptr, y_ptr, cos_ptr, sin_ptr, BLOCK: tl.constexpr, APPROX: tl.constexpr):
    """Two normals from two words each, given as int32."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i).to(tl.uint32, bitcast=True)
    y = tl.load(y_ptr + i).to(tl.uint32, bitcast=True)
    cos, sin = _box_muller(x, y, APPROX)
    tl.store(cos_ptr + i, cos)
    tl.store(sin_ptr + i, sin)


@triton.jit
def scale_kernel(s_ptr, sigma_ptr, log_variance_ptr, slope_ptr, PARAM: tl.constexpr,
                 BLOCK: tl.constexpr, APPROX: tl.constexpr):  # fmt: skip
    """σ, log σ² and d(log σ)/ds."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(s_ptr + i)
    log_variance, sigma = log_variance_and_scale(s, PARAM, APPROX)
    tl.store(sigma_ptr + i, sigma)
    tl.store(log_variance_ptr + i, log_variance)
    tl.store(slope_ptr + i, log_scale_slope(s, PARAM, APPROX))


@triton.jit
def likelihood_kernel(x_ptr, mean_ptr, s_ptr, nll_ptr, g_mean_ptr, g_log_tau_ptr,
                      df: tl.float64, constant: tl.float64, x_mul: tl.float64,
                      LIKELIHOOD: tl.constexpr, PARAM: tl.constexpr, BLOCK: tl.constexpr,
                      APPROX: tl.constexpr):  # fmt: skip
    """One element's -log p(x), ∂mean and ∂(log τ)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, mean, s = tl.load(x_ptr + i), tl.load(mean_ptr + i), tl.load(s_ptr + i)
    df, constant = tl.full((), df, s.dtype), tl.full((), constant, s.dtype)
    x_mul = tl.full((), x_mul, s.dtype)
    log_variance, root = log_variance_and_root(s, PARAM, APPROX)
    nll = element_nll(
        x, mean, log_variance, root, df, constant, x_mul, 0.0 * x_mul,
        LIKELIHOOD, APPROX,
    )  # fmt: skip
    _, fall, g_log_tau = element_gradients(
        1.0, x, mean, root, df, x_mul, 0.0 * x_mul, LIKELIHOOD, APPROX
    )
    tl.store(nll_ptr + i, nll)
    tl.store(g_mean_ptr + i, -fall)
    tl.store(g_log_tau_ptr + i, g_log_tau)


@triton.jit
def kl_kernel(t_ptr, expm1_ptr, rest_ptr, BLOCK: tl.constexpr, APPROX: tl.constexpr):
    """e^t - 1 and e^t - 1 - t."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expm1, rest = expm1_and_rest(tl.load(t_ptr + i), APPROX)
    tl.store(expm1_ptr + i, expm1)
    tl.store(rest_ptr + i, rest)


@triton.jit
def root_kernel(log_variance_ptr, root_ptr, BLOCK: tl.constexpr, APPROX: tl.constexpr):
    """τ^(-1/2), by which residuals are divided."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(root_ptr + i, exponential_root(tl.load(log_variance_ptr + i), APPROX))


def run(kernel, inputs: list[Tensor], outputs: int, approx: int, *args, **options) -> list[Tensor]:
    """Results in the shape of the inputs, (n,), and in their dtype, or fp32 of words."""
    n = inputs[0].numel()
    padded = [torch.nn.functional.pad(t, (0, -n % BLOCK), value=1) for t in inputs]
    dtype = inputs[0].dtype if inputs[0].is_floating_point() else torch.float32
    results = [torch.empty_like(padded[0], dtype=dtype) for _ in range(outputs)]
    kernel[(padded[0].numel() // BLOCK,)](
        *padded, *results, *args, BLOCK=BLOCK, APPROX=approx, **options
    )
    return [t[:n] for t in results]


# ---- what is measured --------------------------------------------------------------------------


def _largest(error: Tensor) -> float:
    """The largest of some errors, of which a NaN is the largest there is."""
    return error.nan_to_num(nan=math.inf).max().item()


def _relative(value: Tensor, truth: Tensor, least: float = 0.0) -> float:
    """The largest error, relative to the truth or to ``least`` if that is more."""
    return _largest((value.double() - truth).abs() / truth.abs().clamp(min=least))


def words() -> tuple[Tensor, Tensor]:
    """Pairs of words, int64: every kind of radius with every kind of angle.

    Both ends of u, the seams of the formulas and of the float grid, quarters of a turn, and random
    ones.
    """
    generator = torch.Generator().manual_seed(0)
    near = torch.arange(-256, 256)
    seams = [1 << p for p in range(33)] + [3 << 30, (1 << 32) - (1 << 21)]
    edges = torch.cat([seam + near * step for seam in seams for step in (1, 256)])
    some = torch.randint(1 << 32, (1 << 16,), generator=generator)
    every = torch.cat([edges[(edges >= 0) & (edges < 1 << 32)].unique(), some])
    shuffled = every[torch.randperm(every.numel(), generator=generator)]
    # With the longest radius, and on both sides of the seam near u = 1, where it is least exact.
    ends = [
        torch.full_like(every, end) for end in (0, (1 << 32) - (1 << 21), (1 << 32) - 2**21 - 512)
    ]
    return torch.cat([every, every, *ends]), torch.cat([every * 0, shuffled, *[every] * len(ends)])


def normals(x: Tensor, y: Tensor, approx: int) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """The kernel's normals from words, int64, and those of noise.py in fp64."""
    truth = noise._box_muller(noise._uniform(x).double(), noise._uniform(y).double())
    return run(noise_kernel, [x.to(torch.int32), y.to(torch.int32)], 2, approx), truth


def parameter(param: str, log_tau: Tensor) -> Tensor:
    """The parameter that means τ, fp32."""
    tau = log_tau.double().exp()
    of = {
        "logvar": 2.0 * log_tau.double(),
        "logstd": log_tau.double(),
        "std": tau,
        "var": tau.square(),
        "softplus": torch.where(tau > 30.0, tau, torch.expm1(tau).log()),
    }
    return of[param].float()


def errors_of_noise(x: Tensor, y: Tensor, approx: int) -> dict[str, float]:
    """Absolute errors of ε."""
    pairs = zip(*normals(x, y, approx), strict=True)
    return {"ε": max(_largest((e.double() - t).abs()) for e, t in pairs)}


def noise_errors(approx: int, device: torch.device) -> dict[str, float]:
    """Absolute errors of ε; and of z = μ + σε, in units of abs(μ) + σ."""
    x, y = (t.to(device) for t in words())
    eps, truth = normals(x, y, approx)
    errors = errors_of_noise(x, y, approx)
    generator = torch.Generator().manual_seed(1)
    s = (16.0 * torch.rand(x.shape, generator=generator) - 8.0).to(device)
    mu = torch.randn(x.shape, generator=generator).to(device)
    mu[: x.numel() // 2] = 0.0
    sigma, *_ = run(scale_kernel, [s], 3, approx, PARAM=0)
    z, true_sigma = mu + sigma * eps[0], (0.5 * s.double()).exp()
    off = z.double() - (mu.double() + true_sigma * truth[0])
    return errors | {"z": _largest(off.abs() / (mu.abs() + true_sigma))}


def scale_errors(param: str, approx: int, device: torch.device) -> dict[str, float]:
    """``errors_of_scale`` for σ of e^-40 to e^40."""
    return errors_of_scale(param, parameter(param, _wide()).to(device), approx)


def _wide() -> Tensor:
    """From -40 to 40: evenly, as densely as fp32 numbers lie, and both sides of ±½, ±1 and ±2."""
    generator = torch.Generator().manual_seed(3)
    first, last = (int(np.float32(x).view(np.int32)) for x in (2.0**-20, 40.0))
    bits = torch.randint(first, last, (1 << 16,), generator=generator).to(torch.int32)
    near = torch.tensor([0.5, 1.0, 2.0])[:, None] * (1.0 + torch.arange(-256, 256) * 2.0**-23)
    some = torch.cat(
        [bits.view(torch.float32), near.flatten(), torch.linspace(0.0, 40.0, 1 << 14)[1:]]
    )
    return torch.cat([some, -some])


def errors_of_scale(param: str, s: Tensor, approx: int) -> dict[str, float]:
    """Errors of σ and d(log σ)/ds, relative, and of log σ², relative to what exceeds 1."""
    code = PARAMS.index(param)
    truth = run(scale_kernel, [s.double()], 3, PLAIN.value, PARAM=code)
    value = run(scale_kernel, [s], 3, approx, PARAM=code)
    names = ("σ", "log σ²", "d(log σ)/ds")
    return {
        f"{name} ({param})": _relative(v, t, least)
        for name, v, t, least in zip(names, value, truth, (0.0, 1.0, 0.0), strict=True)
    }


def root_errors(approx: int, device: torch.device) -> dict[str, float]:
    """``errors_of_root`` for roots of e^-87 to e^87, beyond which they are clamped."""
    return errors_of_root(8.7 * _wide().to(device), approx)


def errors_of_root(log_variance: Tensor, approx: int) -> dict[str, float]:
    """Relative errors of τ^(-1/2)."""
    (truth,) = run(root_kernel, [log_variance.double()], 1, PLAIN.value)
    (value,) = run(root_kernel, [log_variance], 1, approx)
    return {"τ^(-1/2)": _relative(value, truth)}


def likelihood_errors(
    likelihood: str, param: str, approx: int, device: torch.device
) -> dict[str, float]:
    """Errors of one element's terms, relative to what exceeds 1, for τ of e^±8."""
    generator = torch.Generator().manual_seed(2)
    shape = (1 << 15,)
    x, mean = torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)
    if likelihood == "logistic":
        x = (x * 256.0).floor() * LEVEL
    s = parameter(param, 16.0 * torch.rand(shape, generator=generator) - 8.0)
    inputs = [t.to(device) for t in (x, mean, s)]
    codes = {"LIKELIHOOD": LIKELIHOODS.index(likelihood), "PARAM": PARAMS.index(param)}
    model = DF, student_t_constant(DF), LEVEL
    truth = run(likelihood_kernel, [t.double() for t in inputs], 3, PLAIN.value, *model, **codes)
    value = run(likelihood_kernel, inputs, 3, approx, *model, **codes)
    name = likelihood if likelihood == "bernoulli" else f"{likelihood}, {param}"
    terms = ("nll", "∂mean") if likelihood == "bernoulli" else ("nll", "∂mean", "∂(log τ)")
    return {
        f"{term} ({name})": _relative(v, t, 1.0)
        for term, v, t in zip(terms, value, truth, strict=False)
    }


def kl_errors(approx: int, device: torch.device) -> dict[str, float]:
    """``errors_of_kl`` for variances that differ by e^-40 to e^40."""
    return errors_of_kl(_wide().to(device), approx)


def errors_of_kl(t: Tensor, approx: int) -> dict[str, float]:
    """Relative errors of the KL's e^t - 1 and e^t - 1 - t."""
    truth = run(kl_kernel, [t.double()], 2, PLAIN.value)
    value = run(kl_kernel, [t], 2, approx)
    names = ("e^t - 1", "e^t - 1 - t")
    return {n: _relative(v, u) for n, v, u in zip(names, value, truth, strict=True)}


def measures() -> list[Callable[[int, torch.device], dict[str, float]]]:
    """All of the above: functions of ``APPROX`` and the device."""
    pairs = [("gaussian", param) for param in PARAMS] + [
        (name, "logvar") for name in LIKELIHOODS[1:]
    ]
    return [
        noise_errors,
        *(functools.partial(scale_errors, param) for param in PARAMS),
        root_errors,
        *(functools.partial(likelihood_errors, *pair) for pair in pairs),
        kl_errors,
    ]


# ---- emulation ---------------------------------------------------------------------------------


def _moved(exact: np.ndarray, name: str, sign: int | np.ndarray) -> np.ndarray:
    """fp32 of an fp64 result, moved by its function's documented error."""
    size, unit, *_ = DOCUMENTED[name].split()
    if unit == "ulp":
        result = exact.astype(np.float32)
        for _ in range(int(size)):
            result = np.nextafter(result, np.float32(sign * np.inf))
    else:
        error = 2.0 ** float(size.removeprefix("2^"))
        if name.startswith("lg2"):
            error = np.where(np.abs(exact) < 1.0, error, error * np.abs(exact))
        elif unit == "relative":
            error = error * np.abs(exact)
        result = (exact + sign * error).astype(np.float32)
    # Infinities, NaNs and zeros are exact; .ftz flushes what is too small.
    result = np.where(np.isfinite(exact) & (exact != 0.0), result, exact.astype(np.float32))
    return np.where(".ftz" in name and np.abs(result) < 2.0**-126, np.float32(0.0) * result, result)


_EXACT = {
    "mul.f32": lambda a, b: (a.astype(np.float64) * b).astype(np.float32),
    "add.f32": lambda a, b: (a.astype(np.float64) + b).astype(np.float32),
    "fma.rn.f32": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
    "fma.rn.sat.f32": lambda a, b, c: np.nan_to_num(
        np.clip(a.astype(np.float64) * b + c, 0.0, 1.0)
    ).astype(np.float32),
    "mul.wide.u32": lambda a, b: a.astype(np.uint64) * b.astype(np.uint64),
    "mov.b16": np.uint16,
    "mov.b32": lambda low, high: low | high.astype(np.uint32) << np.uint32(16),
}
_FUNCTIONS = {
    "ex2.approx.ftz.f32": np.exp2,
    "lg2.approx.ftz.f32": np.log2,
    "sqrt.approx.ftz.f32": np.sqrt,
    "rcp.approx.ftz.f32": np.reciprocal,
    "sin.approx.ftz.f32": np.sin,
    "cos.approx.ftz.f32": np.cos,
}


class Emulation:
    """While entered, the interpreter runs inline PTX, and fp32 functions as inexact as on a GPU.

    Attributes:
        signs: which way each function errs, +1 or -1; those not named err upwards.
        draws: draws the way for each value instead.
        used: the functions that were called.
    """

    def __init__(
        self, signs: dict[str, int] | None = None, draws: np.random.Generator | None = None
    ) -> None:
        self.signs, self.draws, self.used = signs or {}, draws, set()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Emulation:
        builder = interpreter.InterpreterBuilder
        plays = {
            "create_inline_asm": lambda _, *args: self._inline_asm(*args),
            "create_sqrt": self._inexact(builder.create_sqrt, np.sqrt, "sqrt.approx.ftz.f32"),
            "create_rsqrt": self._inexact(
                builder.create_rsqrt, lambda x: 1.0 / np.sqrt(x), "rsqrt.approx.ftz.f32"
            ),
            "create_fdiv": self._inexact(builder.create_fdiv, np.divide, "div.full.f32"),
            "create_log": self._inexact(builder.create_log, np.log, "logf"),
        }
        for name, play in plays.items():
            self._stack.enter_context(mock.patch.object(builder, name, play))
        self._stack.enter_context(np.errstate(all="ignore"))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _approximate(self, name: str, exact: np.ndarray) -> np.ndarray:
        self.used.add(name)
        if self.draws is not None:
            return _moved(exact, name, self.draws.choice((-1, 1), exact.shape))
        return _moved(exact, name, self.signs.get(name, 1))

    def _inexact(self, original: Callable, function: Callable, name: str) -> Callable:
        def create(builder, *args):
            if args[0].data.dtype != np.float32:
                return original(builder, *args)
            exact = function(*(a.data.astype(np.float64) for a in args))
            return interpreter.TensorHandle(self._approximate(name, exact), args[0].dtype.scalar)

        return create

    def _inline_asm(self, asm: str, constraints: str, values: list, types: list, *_: object):
        """Run PTX, one instruction after another."""
        outputs = constraints.count("=")
        registers = {f"${outputs + i}": value.data for i, value in enumerate(values)}

        def read(operand: str) -> np.ndarray:
            if operand.startswith("0f"):
                return np.float32(struct.unpack(">f", bytes.fromhex(operand[2:]))[0])
            return registers[operand] if operand in registers else int(operand)

        for line in re.sub(r"^\s*{|}\s*$", "", asm).split(";"):
            opcode, *operands = re.findall(r"[^\s,{}]+", line) or [".reg"]
            if opcode == ".reg":
                continue
            if opcode == "mov.b64":  # {low, high}, register
                low, high, wide = operands
                registers[low] = registers[wide].astype(np.uint32)
                registers[high] = (registers[wide] >> np.uint64(32)).astype(np.uint32)
            elif opcode in _FUNCTIONS:
                exact = _FUNCTIONS[opcode](read(operands[1]).astype(np.float64))
                registers[operands[0]] = self._approximate(opcode, exact)
            else:
                registers[operands[0]] = _EXACT[opcode](*map(read, operands[1:]))
        results = [
            interpreter.TensorHandle(registers[f"${i}"], ty.scalar) for i, ty in enumerate(types)
        ]
        return SimpleNamespace(get_result=lambda i: results[i])


def bounds(approx: int, some: list[Callable] | None = None) -> dict[str, float]:
    """The worst error of each quantity over the ways in which the functions may err."""
    worst: dict[str, float] = {}
    cpu = torch.device("cpu")
    for measure in some or measures():
        with Emulation() as first:
            measure(approx, cpu)
        names = sorted(first.used - {"sin.approx.ftz.f32"})
        ways = [Emulation(draws=np.random.default_rng(seed)) for seed in range(DRAWS)]
        for way in itertools.product((-1, 1), repeat=len(names)):
            signs = dict(zip(names, way, strict=True))
            # No result depends on both the sine and the cosine.
            signs["sin.approx.ftz.f32"] = signs.get("cos.approx.ftz.f32", 1)
            ways.append(Emulation(signs))
        for emulation in ways:
            with emulation:
                for name, error in measure(approx, cpu).items():
                    worst[name] = max(worst.get(name, 0.0), error)
    return {name: error for name, error in worst.items() if error}


def exact() -> dict[str, float]:
    """The same errors with every function rounded correctly, or nearly: those of fp32 itself."""
    cpu = torch.device("cpu")
    return {name: e for measure in measures() for name, e in measure(PLAIN.value, cpu).items()}


if __name__ == "__main__":
    limits = {"bounds": bounds(FP32.value), "bounds of 16 bits": bounds(FP16.value)}
    json.dump({"documented": DOCUMENTED, **limits, "exact": exact()}, sys.stdout)
