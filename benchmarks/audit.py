"""What the Triton kernels compile to, with no GPU: registers, spills, accesses, instructions.

    python -m benchmarks.audit [--json] [--only TEXT] [--out DIR]

The launchers themselves are run on tensors without memory, with the launch recorded instead of
made, so that what is audited is what would be launched: the same heuristics, specialisation and
options. Each launch is compiled for the targets asked for and taken apart with the tools that
Triton ships (see sass.py).

Printed are the cases that show what each feature costs. ``--out`` audits every configuration that
the heuristics can choose as well, and writes all of it, with the accuracy of the approximate
functions (see accuracy.py), to DIR/audit.md and the files beside it: some twenty minutes on two
cores.

Executed instructions per element are counted in sm_90 SASS, for a program that is not the last to
finish (the last one's tail, behind the exit that the others take after the ticket, is left out).
A loop's body counts once per trip, the trips being known from the launch; code that a forward
branch may skip counts as executed. All lanes that a program spends on masked-off elements are paid
for: the divisor is the elements that exist.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import audit_report, sass
from benchmarks.audit_report import Report

#: What Triton takes, and the disassembler's name for it.
TARGETS = {
    "sm_80": (("cuda", 80, 32), "SM80"),
    "sm_90": (("cuda", 90, 32), "SM90a"),
    "sm_100": (("cuda", 100, 32), "SM100a"),
    "gfx942": (("hip", "gfx942", 64), ""),
}
#: Multiprocessors and threads in a warp that the heuristics are given: of an H200 and an MI300X.
MACHINES = {"cuda": (132, 32), "hip": (304, 64)}

LOGVAR, LOGSTD, STD, VAR, SOFTPLUS = range(5)
GAUSSIAN, LAPLACE, BERNOULLI, LOGISTIC, STUDENT_T, SQUARED_ERROR = range(6)
UNCLAMPED = (-math.inf, math.inf)


@dataclass(frozen=True)
class Case:
    """One call of a launcher.

    Attributes:
        op: name of the launcher.
        rows: batch size B.
        size: elements per row.
        dtype: storage dtype of all tensors, or of all but ``wide``.
        scale: "full", "scalar", or for a likelihood "packed", "row" or "event".
        samples: K; 0 for none.
        wide: x, or the latent's scale, is fp32 whatever ``dtype`` is.
        likelihood: index of the likelihood.
        levels: x is uint8, and is dequantized.
        soft: the clamp is soft.
        path: the latent's gradient is the path gradient.
        prior: a KL's prior is given.
        transposed: rows lie side by side, element by element; a row's elements are far apart.
        apart: what has one byte an element, mask or levels, is one of 16 in memory.
    """

    op: str
    rows: int
    size: int
    dtype: str = "float32"
    scale: str = "full"
    samples: int = 0
    param: int = LOGVAR
    clamp: tuple[float, float] = UNCLAMPED
    mask: bool = False
    reduction: int = 0
    wide: bool = False
    likelihood: int = GAUSSIAN
    levels: bool = False
    soft: bool = False
    path: bool = False
    prior: bool = True
    transposed: bool = False
    apart: bool = False
    targets: tuple[str, ...] = ("sm_90",)

    def __str__(self) -> str:
        parts = [self.op, f"{self.rows}x{self.size}", self.dtype]
        if self.scale != "full":
            parts.append(self.scale)
        if self.samples:
            parts.append(f"K={self.samples}")
        if self.param:
            parts.append(("logvar", "logstd", "std", "var", "softplus")[self.param])
        if self.likelihood:
            parts.append(_LIKELIHOODS[self.likelihood])
        parts += ["soft"] * self.soft + ["clamp"] * (self.clamp != UNCLAMPED)
        parts += ["mask"] * self.mask + ["mixed"] * self.wide + ["levels"] * self.levels
        parts += ["path"] * self.path + ["standard"] * (not self.prior)
        parts += ["transposed"] * self.transposed + ["apart"] * self.apart
        return " ".join(parts)


ALL = tuple(TARGETS)
_LIKELIHOODS = ("gaussian", "laplace", "bernoulli", "logistic", "student_t", "squared_error")
_LATENT = ("latent_forward", "latent_backward")
_LIKELIHOOD = ("likelihood_forward", "likelihood_backward", "likelihood_forward_grad")
_KL = ("gaussian_kl_forward", "gaussian_kl_backward")

#: One case for each class of launch that the heuristics choose between, and each optional feature.
CASES = (
    # Latent: the tile of each size of row; two rows to a thread, one, a warp's width, four warps.
    *(Case(op, 16384, 256, d, targets=ALL) for op in _LATENT for d in ("float32", "bfloat16")),
    *(Case(op, 65536, n, d) for op in _LATENT for n in (16, 20) for d in ("float32", "bfloat16")),
    *(Case("latent_forward", 16384, size) for size in (64, 128, 512, 4096)),
    *(Case("latent_forward", 65536, size, "bfloat16") for size in (1024, 3072)),
    Case("latent_forward", 64, 16),
    Case("latent_forward", 4096, 100),
    Case("latent_backward", 256, 784),
    *(Case(op, 4096, 1) for op in _LATENT),  # where Triton knows the size as a constant
    *(Case(op, 4096, 64, scale="scalar", clamp=(-5.0, 5.0)) for op in _LATENT),
    *(Case(op, 4096, 64, samples=8) for op in _LATENT),
    *(Case(op, 4096, 64, param=SOFTPLUS) for op in _LATENT),
    *(Case(op, 4096, 64, param=VAR) for op in _LATENT),
    *(Case(op, 4096, 64, "bfloat16", wide=True) for op in _LATENT),
    *(Case(op, 4096, 64, "float64") for op in _LATENT),
    # Likelihood: a warp to a row, a program to a row, a row split over programs; short rows.
    *(Case(op, 16384, 3072, "float32", targets=ALL) for op in _LIKELIHOOD),
    *(Case(op, 16384, 3072, "bfloat16") for op in _LIKELIHOOD[:2]),
    Case(_LIKELIHOOD[2], 16384, 3072, "bfloat16", targets=ALL),
    *(Case(op, 256, 784) for op in _LIKELIHOOD),
    *(Case(op, 256, 196608) for op in _LIKELIHOOD),
    *(Case("likelihood_forward_grad", 256, size, "bfloat16") for size in (784, 196608)),
    Case("likelihood_forward", 16384, 16),
    *(Case(op, 16384, 784, scale="packed") for op in _LIKELIHOOD),
    *(Case(op, 16384, 784, scale="scalar") for op in _LIKELIHOOD),
    *(Case(op, 4096, 784, mask=True) for op in _LIKELIHOOD),
    Case("likelihood_forward_grad", 4096, 784, "bfloat16", mask=True),
    Case("likelihood_forward_grad", 4096, 784, mask=True, apart=True),
    *(Case(op, 4096, 784, param=SOFTPLUS, clamp=(-5.0, 5.0)) for op in _LIKELIHOOD),
    *(Case(op, 4096, 784, param=VAR) for op in _LIKELIHOOD),
    *(Case(op, 4096, 784, samples=8, reduction=1) for op in _LIKELIHOOD),
    *(Case(op, 4096, 784, "bfloat16", wide=True) for op in _LIKELIHOOD),
    *(Case(op, 4096, 784, "float64") for op in _LIKELIHOOD),
    *(Case("likelihood_rescale_", 4096, 3072, d) for d in ("float32", "bfloat16")),
    # Other likelihoods, shapes of their scale, 8-bit data.
    *(Case(op, 4096, 784, likelihood=LAPLACE) for op in _LIKELIHOOD),
    *(Case(op, 4096, 784, likelihood=BERNOULLI, scale="none") for op in _LIKELIHOOD),
    *(Case(op, 4096, 784, likelihood=LOGISTIC, targets=ALL) for op in _LIKELIHOOD),
    *(Case(op, 4096, 784, likelihood=STUDENT_T, targets=ALL) for op in _LIKELIHOOD),
    *(Case(op, 4096, 784, likelihood=LOGISTIC, param=SOFTPLUS) for op in _LIKELIHOOD),
    *(Case(op, 4096, 784, levels=True, targets=ALL) for op in _LIKELIHOOD),
    *(Case(op, 4096, 784, "bfloat16", levels=True) for op in _LIKELIHOOD),
    Case("likelihood_forward", 4096, 784, levels=True, apart=True),
    Case("likelihood_forward", 4096, 1, levels=True),
    *(Case(op, 4096, 784, clamp=(-5.0, 5.0), soft=True) for op in _LIKELIHOOD),
    *(Case(op, 4096, 784, scale="row") for op in _LIKELIHOOD),
    Case("likelihood_backward", 16384, 3072, scale="event", targets=ALL),
    Case("likelihood_backward", 4096, 784, "bfloat16", scale="event"),
    Case("likelihood_backward", 4096, 784, scale="event", likelihood=STUDENT_T, param=SOFTPLUS),
    # Latent with a path gradient; KL with a prior and without; the importance-weighted bound.
    Case("latent_backward", 16384, 256, path=True),
    *(Case(op, 4096, 64, clamp=(-5.0, 5.0), soft=True) for op in _LATENT),
    *(Case(op, 16384, 256, targets=ALL) for op in _KL),
    *(Case(op, 16384, 256, "bfloat16") for op in _KL),
    *(Case(op, 16384, 256, prior=False) for op in _KL),
    Case("importance_forward", 16384, 0, samples=64, targets=ALL),
    # Elements so far apart that their offsets do not fit in 32 bits.
    *(Case(op, 1 << 26, 64, transposed=True) for op in (*_LATENT, *_KL, *_LIKELIHOOD)),
    Case("likelihood_rescale_", 1 << 26, 64, transposed=True),
)


# ---- recording a launch ------------------------------------------------------------------------


@dataclass
class Launch:
    """The arguments of one kernel launch."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    programs: int


class _Recorder:
    """Stands for a kernel; ``kernel[grid](...)`` keeps the arguments."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*args: Any, **kwargs: Any) -> None:
            arguments = dict(zip(self.kernel.arg_names, args, strict=False))
            arguments |= {k: v for k, v in kwargs.items() if k in self.kernel.arg_names}
            options = {k: v for k, v in kwargs.items() if k not in self.kernel.arg_names}
            self.launches.append(Launch(self.kernel, arguments, options, grid[0]))

        return launch


def record(case: Case, backend: str) -> Launch:
    """Run ``case``'s launcher as it would run for ``backend``, up to the launch."""
    from vae_fast._triton import importance, kl, latent, likelihood
    from vae_fast._triton.launch import Place

    launches: list[Launch] = []
    kernels = {
        latent: ("latent_forward_kernel", "latent_backward_kernel"),
        likelihood: ("likelihood_kernel", "rescale_kernel"),
        kl: ("kl_forward_kernel", "kl_backward_kernel"),
        importance: ("importance_kernel",),
    }
    plays = {
        "place": lambda t: Place(backend, -1, *MACHINES[backend]),
        "on_device": lambda where, name: contextlib.nullcontext(),
    }
    saved = [
        (m, n, getattr(m, n))
        for m, names in kernels.items()
        for n in (*names, *plays)
        if hasattr(m, n)
    ]
    for module, name, value in saved:
        setattr(module, name, plays.get(name) or _Recorder(value, launches))
    try:
        with torch.device("meta"):
            _call(case)
    finally:
        for module, name, value in saved:
            setattr(module, name, value)
    (launch,) = launches
    return launch


def _call(case: Case) -> None:
    import vae_fast._triton as ops

    dtype = getattr(torch, case.dtype)
    other = torch.float32 if case.wide else dtype
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    b, d, k = case.rows, case.size, max(case.samples, 1)
    if case.op == "importance_forward":
        nll, log_q, log_p = (torch.empty(k, b, dtype=acc) for _ in range(3))
        ops.importance_forward(nll.flatten(), log_q, log_p, 1.0)
        return
    clamp = (*case.clamp, case.soft)

    def empty(rows: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        shape = (size, rows) if case.transposed else (rows, size)
        t = torch.empty(shape, dtype=dtype)
        return t.t() if case.transposed else t

    if case.op.startswith("latent"):
        mu = empty(b, d, dtype)
        scale = torch.empty((), dtype=other) if case.scale == "scalar" else empty(b, d, other)
        key = torch.empty(2, dtype=torch.uint64)
        options = (key, case.samples, 3, case.param, *clamp, case.path)
        if case.op == "latent_forward":
            ops.latent_forward(mu, scale, *options)
        else:
            lead = (k, b) if case.samples else (b,)
            g_log_q, g_log_p = torch.empty(lead, dtype=acc), torch.empty(lead, dtype=acc)
            g_z = torch.empty(*lead, d, dtype=dtype)
            ops.latent_backward(g_z, g_log_q, g_log_p, mu, scale, *options)
        return
    if case.op.startswith("gaussian_kl"):
        mu = empty(b, d, dtype)
        prior = (torch.empty_like(mu), torch.empty_like(mu)) if case.prior else (None, None)
        g_kl = (torch.empty(b, dtype=acc),) if case.op.endswith("backward") else ()
        getattr(ops, case.op)(*g_kl, mu, torch.empty_like(mu), *prior, case.param, LOGVAR, *clamp)
        return

    def of_bytes(dtype: torch.dtype) -> torch.Tensor:
        if case.apart:
            return torch.empty(b, d, 16, dtype=dtype)[..., 0]
        return empty(b, d, dtype)

    x = of_bytes(torch.uint8) if case.levels else empty(b, d, other)
    mean = empty(k * b, 2 * d if case.scale == "packed" else d, dtype)
    scale = {
        "full": torch.empty_like(mean),
        "packed": None,
        "none": None,
        "scalar": torch.empty((), dtype=dtype),
        "row": torch.empty(k * b, 1, dtype=dtype),
        "event": torch.empty(1, d, dtype=dtype),
    }[case.scale]
    log_q, log_p = torch.empty(k * b, dtype=acc), torch.empty(k * b, dtype=acc)
    loss = torch.empty((), dtype=acc)
    mask = of_bytes(torch.bool) if case.mask else None
    if case.op == "likelihood_rescale_":
        ops.likelihood_rescale_(mean, scale, None, None, loss, 1.0, case.reduction, k, b)
        return
    key = torch.empty(2, dtype=torch.uint64) if case.levels else None
    model = (case.likelihood, case.param, *clamp, 4.0, 1.0 / 255.0, 0.0, key, 3)
    options = (1.0, case.reduction, *model)
    if case.op == "likelihood_backward":
        ops.likelihood_backward(None, loss, x, mean, scale, mask, *options, False, True, True)
    elif case.op == "likelihood_forward":
        ops.likelihood_forward(x, mean, scale, mask, log_q, log_p, *options)
    else:
        g_scale = torch.empty_like(scale) if case.scale == "full" else None
        gradients = (torch.empty_like(mean), g_scale)
        ops.likelihood_forward_grad_(x, mean, scale, mask, log_q, log_p, *options, *gradients)


# ---- compiling it ------------------------------------------------------------------------------

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.uint64: "*u64",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}


def compile_launch(launch: Launch, target: str) -> Any:
    """Compile as Triton's JIT would: ones are constants, multiples of 16 are known to be such."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value, name = launch.arguments[parameter.name], parameter.name
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and _is_one(value)):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = parameter.annotation_type or "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget(*TARGETS[target][0]), options=launch.options)


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == 1


# ---- what the heuristics can choose --------------------------------------------------------------

# Each class of sizes and of rows that the heuristics tell apart, and its neighbours.
_SIZES = [n + more for p in range(18) for n in (2**p, 3 * 2**p) for more in (-1, 0, 1, 2, 4, 8, 16)]
_ROWS = [n + more for p in range(20) for n in (2**p, 3 * 2**p) for more in (-1, 0, 1)]
_ROWS += [n * 2**p + more for p in range(13) for n in (132, 304) for more in (-1, 0)]
_MOST = 2**31  # elements of a tensor: 8 GiB of fp32


def _tile(rows: int, cols: int, tiles: int, warps: int) -> str:
    return f"{rows}x{cols}x{tiles} w{warps}"


def _traits(steps: int, passes: int, split: int, even: bool, align: int) -> str:
    """What else makes a kernel of its own: loops; no mask; what rows' first elements divide by."""
    names = ("steps", "passes", "split", "even", f"/{align}")
    held = (steps > 1, passes > 1, split > 1, even, True)
    return " ".join(name for name, holds in zip(names, held, strict=True) if holds)


def _heuristic(case: Case, target: str) -> tuple[Any, ...]:
    """What chooses a configuration: a function, the size of an element, and what it takes after."""
    from vae_fast._triton import likelihood as passes
    from vae_fast._triton.config import latent_config, likelihood_config
    from vae_fast._triton.scale import clamp_code

    itemsize, machine = getattr(torch, case.dtype).itemsize, MACHINES[TARGETS[target][0][0]]
    if not case.op.startswith("likelihood"):
        return latent_config, itemsize, *machine
    if case.op == "likelihood_rescale_":
        return likelihood_config, itemsize, *machine, 0, False, True, 32, True
    clamp = clamp_code(*case.clamp, case.soft)
    heavy = passes.heaviness(case.likelihood, case.param, clamp)
    forward, kinds = case.op != "likelihood_backward", {"none": "ABSENT", "packed": "FULL"}
    kind = getattr(passes, kinds.get(case.scale, case.scale.upper()))
    how = passes.sums_and_most(forward, kind.value, case.reduction)
    grad = case.op != "likelihood_forward"
    return likelihood_config, itemsize, *machine, heavy, case.scale == "event", *how, grad


def _chosen(heuristic: tuple[Any, ...], rows: int, size: int) -> tuple[str, str]:
    """Tile and traits of a call with contiguous tensors."""
    from vae_fast._triton.launch import alignment

    function, itemsize, *given = heuristic
    align = alignment(16 // itemsize, size)
    c = function(rows, size, itemsize, align, *given)
    loops = (getattr(c, name, 1) for name in ("steps", "passes", "split"))
    tile = _tile(c.rows, c.cols, c.tiles, c.num_warps)
    return tile, _traits(*loops, c.even, align)


@functools.cache
def _largest(heuristic: tuple[Any, ...]) -> dict[tuple[str, str], tuple[int, int]]:
    """Every tile and traits that there are, with the largest rows and size that get it."""
    largest: dict[tuple[str, str], tuple[int, int]] = {}
    for rows, size in itertools.product(_ROWS, _SIZES):
        if 0 < rows <= 1_000_000 and 0 < size <= 200_000 and rows * size <= _MOST:
            key = _chosen(heuristic, rows, size)
            if rows * size > math.prod(largest.get(key, (0,))):
                largest[key] = rows, size
    return largest


def configuration(case: Case, target: str) -> tuple[str, str]:
    """Tile and traits that the heuristics choose for ``case``."""
    return _chosen(_heuristic(case, target), case.rows, case.size)


def configurations(case: Case, target: str) -> dict[tuple[str, str], Case]:
    """Every tile and traits that there are for ``case``, and the largest that gets it."""
    found = {}
    for (tile, traits), (rows, size) in _largest(_heuristic(case, target)).items():
        if case.op == "likelihood_rescale_":  # always masked
            traits = traits.replace("even ", "")
        found[tile, traits] = replace(case, rows=rows, size=size, targets=(target,))
    return found


def all_configurations() -> dict[tuple[str, str, str, str], Case]:
    """The sweep: by name of the case without its rows and size, target, tile and traits.

    In fp32 and bf16 on sm_90, all of them. Elsewhere each tile once, with rows that need a mask
    where it has such. Then every likelihood with every scale, at its plainest and with every
    option, on sm_90, of whole vectors and of less.
    """
    plain = [
        Case(op, 0, 0, dtype)
        for op in (*_LATENT, *_KL, *_LIKELIHOOD, "likelihood_rescale_")
        for dtype in ("float32", "bfloat16", "float64")
    ]
    # Those with fewer elements to a thread, and the one that sums columns.
    special = [
        Case(op, 0, 0, dtype, likelihood=likelihood, param=param)
        for op in _LIKELIHOOD
        for dtype in ("float32", "bfloat16")
        for likelihood, param in ((STUDENT_T, LOGVAR), (LOGISTIC, SOFTPLUS))
    ]
    special += [
        Case("likelihood_backward", 0, 0, dtype, scale="event") for dtype in ("float32", "bfloat16")
    ]
    sweep = {}
    for target, case in itertools.product(TARGETS, (*plain, *special)):
        every = target == "sm_90" and case in plain and case.dtype != "float64"
        found = configurations(case, target)
        # A mask and the most aligned rows last, so that they stay where one of several is kept.
        order = sorted(found, key=lambda key: ("even" not in key[1], alignment_of(key[1])))
        kept = {key if every else key[0]: key for key in order}
        name = str(case).replace(" 0x0", "")
        sweep |= {(name, target, *key): found[key] for key in kept.values()}
    for case in _models():
        sweep[(str(case), "sm_90", *configuration(case, "sm_90"))] = case
    order = list(TARGETS)  # which audit_all goes by
    return dict(sorted(sweep.items(), key=lambda item: order.index(item[0][1])))


def _models() -> Iterable[Case]:
    """Every likelihood with every scale, at its plainest and with every option."""
    scaled = itertools.product((GAUSSIAN, LAPLACE, LOGISTIC, STUDENT_T), range(5), ("full",))
    models = (*scaled, (BERNOULLI, LOGVAR, "none"), (SQUARED_ERROR, LOGVAR, "none"))
    for op, dtype, model, size in itertools.product(
        _LIKELIHOOD, ("float32", "bfloat16"), models, (783, 784)
    ):
        likelihood, param, scale = model
        case = Case(op, 4096, size, dtype, scale, param=param, likelihood=likelihood)
        yield case
        if scale == "full":
            case = replace(case, clamp=(-5.0, 5.0), soft=True)
        yield replace(case, mask=True, levels=True)


def alignment_of(traits: str) -> int:
    """What divides the rows' first elements."""
    return int(traits.split("/")[1])


# ---- taking it apart ---------------------------------------------------------------------------


def _tile_converts(ttgir: str, rows: int) -> int:
    """Layout conversions of tensors with more to a row than the one or two sums over it."""
    shapes = re.findall(r"ttg\.convert_layout .*?: tensor<([\dx]+)x\D", ttgir)
    return sum(math.prod(map(int, shape.split("x"))) > 2 * rows for shape in shapes)


def _traffic(launch: Launch) -> int:
    """Bytes that a launch moves if every tensor passes once; scratch memory stays in the cache."""
    storages = {}
    for name, value in launch.arguments.items():
        if isinstance(value, torch.Tensor) and name not in ("counter_ptr", "partial_ptr"):
            storage = value.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    in_place = launch.kernel.fn.__name__ == "rescale_kernel"  # read and written
    return sum(storages.values()) * (2 if in_place else 1)


def _count(report: Report, case: Case, launch: Launch, kernel: list[sass.Instruction]) -> None:
    """What one element costs, into ``report``; nothing if the loops are not those of the launch."""
    a = launch.arguments
    report.bytes = _traffic(launch) / (case.rows * max(case.size, 1) * max(case.samples, 1))
    if case.op == "importance_forward":
        trips = (case.samples // a["SAMPLES"],) * 2
        elements = a["ROWS"] * case.samples
    elif case.op in ("latent_backward", "gaussian_kl_backward"):
        trips = (max(case.samples, 1),)
        elements = a["ROWS"] * case.size / a["steps"] * trips[0]
    else:
        trips = (a["passes"], a["steps"]) if "passes" in a else (a["steps"],)
        elements = a["ROWS"] * a.get("passes", 1) * case.size / a.get("SPLIT", 1)
    try:
        counts = sass.executed(kernel, trips)
    except ValueError as error:
        report.uncounted = str(error)
        return
    share = 32 * launch.options["num_warps"] / elements
    report.executed = sum(n for _, n in counts)
    report.per_element = round(report.executed * share, 1)
    report.pipes = {
        pipe: round(share * sum(n for i, n in counts if i.pipe == pipe), 2) for pipe in sass.PIPES
    }
    report.words = share * sum(n * i.words for i, n in counts if i.pipe == "lsu")


def _audit(jobs: tuple[tuple[Case, str], ...]) -> list[Report]:
    """Compile some cases, all for one target, and take them apart."""
    target = jobs[0][1]
    (backend, *_), architecture = TARGETS[target]
    launches = [record(case, backend) for case, _ in jobs]
    binaries = []
    for (case, _), launch in zip(jobs, launches, strict=True):
        try:
            binaries.append(compile_launch(launch, target))
        except Exception as error:
            raise RuntimeError(f"{case} does not compile for {target}") from error
    reports = []
    for (case, _), launch, binary in zip(jobs, launches, binaries, strict=True):
        a = launch.arguments
        columns, tiles = a.get("COLS", a.get("SAMPLES")), a.get("TILES", 1)
        tile = _tile(a["ROWS"], columns, tiles, launch.options["num_warps"])
        loops = (a.get(name, 1) for name in ("steps", "passes", "SPLIT"))
        traits = _traits(*loops, a.get("EVEN", False), a.get("ALIGN", 1))
        report = Report(str(case), case.op, case.dtype, target, tile, traits)
        report.shared = binary.metadata.shared
        report.converts = _tile_converts(binary.asm["ttgir"], a["ROWS"] * tiles)
        report.narrow = sorted(set(re.findall(r"tt\.splat %(\w+_col) : i32", binary.asm["ttir"])))
        reports.append(report)
    if backend == "hip":
        for report, binary in zip(reports, binaries, strict=True):
            text = binary.asm["amdgcn"]
            report.registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
            # Scalar registers spill into vector registers, and only those into memory.
            report.spills = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
            report.loads = sass.amd_widths(text, "load")
            report.stores = sass.amd_widths(text, "store")
        return reports

    cubins = [binary.asm["cubin"] for binary in binaries]
    kernels = sass.disassemble(cubins, architecture)
    for i, report in enumerate(reports):
        kernel = kernels[i]
        report.registers = sass.registers(cubins[i])
        # Every access to local memory: spills, and arrays indexed at run time.
        report.spills = sum(k.opcode.startswith(("LDL", "STL")) for k in kernel)
        report.loads, report.stores = sass.widths(kernel, "LDG"), sass.widths(kernel, "STG")
        kinds = ("BAR", "MEMBAR", "ATOMG", "CCTL", "EXIT")
        marks = (k for k in kernel if k.opcode.startswith(kinds) or ".STRONG." in k.opcode)
        report.ordering = [k.opcode for k in marks]
        inexact = re.findall(r"\b\w+\.(?:approx|full)[.\w]*", binaries[i].asm["ptx"])
        report.approximate = sorted(set(inexact))
        if target == "sm_90":
            _count(report, jobs[i][0], launches[i], kernel)
    return reports


def audit_all(cases: Iterable[Case] = CASES, workers: int | None = None) -> list[Report]:
    """Audit every case for each of its targets, in worker processes."""
    jobs = [(case, target) for target in TARGETS for case in cases if target in case.targets]
    chunks = []
    for _, group in itertools.groupby(jobs, key=lambda job: job[1]):
        while chunk := tuple(itertools.islice(group, 16)):
            chunks.append(chunk)
    reports: list[Report] = []
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        for some in pool.map(_audit, chunks):
            reports += some
            print(f"\r{len(reports)} of {len(jobs)} compiled", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return reports


def _accuracy() -> dict[str, dict[str, float]]:
    """What accuracy.py gives: in a process of its own, for there the kernels are interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.accuracy"]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(run.stdout)


def main() -> None:
    """Print the cases as tables or JSON, or write everything."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--out", type=Path, help="audit everything into this folder")
    args = parser.parse_args()
    reports = audit_all([c for c in CASES if args.only in str(c)])
    if args.json:
        json.dump([asdict(r) for r in reports], sys.stdout)
    elif args.out is None:
        print(audit_report.cases(reports))
    else:
        accuracy, every = _accuracy(), all_configurations()
        swept = dict(zip(every, audit_all(every.values()), strict=True))
        wrong = [key for key, r in swept.items() if (r.tile, r.traits) != key[2:]]
        if wrong:
            raise RuntimeError(f"the launchers choose otherwise than the heuristics: {wrong[:3]}")
        audit_report.write(args.out, reports, swept, accuracy)


if __name__ == "__main__":
    main()
