"""What the Triton kernels compile to, with no GPU: registers, spills, access widths, instructions.

    python -m benchmarks.audit [--json] [--only TEXT]

The launchers themselves are run on CPU tensors, with the launch recorded instead of made, so that
what is audited is what would be launched: the same heuristics, specialisation and options. Each
launch is compiled for the targets asked for and taken apart with the tools that Triton ships.

Executed instructions per element are counted in sm_90 SASS, for a program that is not the last to
finish (the last one's tail, behind the exit that the others take after the ticket, is left out).
A loop's body counts once per trip, the trips being known from the launch; code that a forward
branch may skip counts as executed. All lanes that a program spends on masked-off elements are paid
for: the divisor is the elements that exist.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
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
    *(Case(op, 65536, 16, d) for op in _LATENT for d in ("float32", "bfloat16")),
    *(Case("latent_forward", 16384, size) for size in (64, 128, 512, 4096)),
    Case("latent_forward", 64, 16),
    Case("latent_forward", 4096, 100),
    Case("latent_backward", 256, 784),
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
    *(Case(op, 4096, 784, clamp=(-5.0, 5.0), soft=True) for op in _LIKELIHOOD),
    *(Case(op, 4096, 784, scale="row") for op in _LIKELIHOOD[:2]),
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
)


@dataclass
class Report:
    """What one compilation gave. ``None`` is for what the target has no such thing as.

    Attributes:
        loads, stores: global accesses of a tile in sm_90 SASS, by width in bits.
        executed: instructions that one thread of a program executes.
        per_element: ``executed`` for each element, over the elements that exist.
        converts: layout conversions of whole tiles through shared memory.
        ordering: barriers, fences and ticket, in the order of the SASS.
    """

    case: str
    op: str
    dtype: str
    target: str
    tile: str
    registers: int | None = None
    spills: int | None = None
    shared: int = 0
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)
    executed: int | None = None
    per_element: float | None = None
    converts: int = 0
    ordering: list[str] = field(default_factory=list)


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

    launches: list[Launch] = []
    kernels = {
        latent: ("latent_forward_kernel", "latent_backward_kernel"),
        likelihood: ("likelihood_kernel", "rescale_kernel"),
        kl: ("kl_forward_kernel", "kl_backward_kernel"),
        importance: ("importance_kernel",),
    }
    machine = (132, 32) if backend == "cuda" else (304, 64)
    plays = {"backend_of": lambda t: backend, "machine": lambda t: machine}
    saved = [
        (m, n, getattr(m, n))
        for m, names in kernels.items()
        for n in (*names, *plays)
        if hasattr(m, n)
    ]
    for module, name, value in saved:
        setattr(module, name, plays.get(name) or _Recorder(value, launches))
    try:
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
        rows = torch.empty(k, b, dtype=acc)
        ops.importance_forward(rows.flatten(), rows, rows, 1.0)
        return
    clamp = (*case.clamp, case.soft)
    if case.op.startswith("latent"):
        mu = torch.empty(b, d, dtype=dtype)
        scale = torch.empty(() if case.scale == "scalar" else (b, d), dtype=other)
        key = torch.empty(2, dtype=torch.uint64)
        options = (key, case.samples, 3, case.param, *clamp, case.path)
        if case.op == "latent_forward":
            ops.latent_forward(mu, scale, *options)
        else:
            lead = (k, b) if case.samples else (b,)
            g_rows = torch.empty(lead, dtype=acc)
            g_z = torch.empty(*lead, d, dtype=dtype)
            ops.latent_backward(g_z, g_rows, g_rows, mu, scale, *options)
        return
    if case.op.startswith("gaussian_kl"):
        mu = torch.empty(b, d, dtype=dtype)
        prior = (mu, mu) if case.prior else (None, None)
        g_kl = (torch.empty(b, dtype=acc),) if case.op.endswith("backward") else ()
        getattr(ops, case.op)(*g_kl, mu, mu, *prior, case.param, LOGVAR, *clamp)
        return
    x = torch.empty(b, d, dtype=torch.uint8 if case.levels else other)
    mean = torch.empty(k * b, 2 * d if case.scale == "packed" else d, dtype=dtype)
    scale = {
        "full": mean,
        "packed": None,
        "none": None,
        "scalar": torch.empty((), dtype=dtype),
        "row": torch.empty(k * b, 1, dtype=dtype),
        "event": torch.empty(1, d, dtype=dtype),
    }[case.scale]
    rows, loss = torch.empty(k * b, dtype=acc), torch.empty((), dtype=acc)
    mask = torch.empty(b, d, dtype=torch.bool) if case.mask else None
    if case.op == "likelihood_rescale_":
        ops.likelihood_rescale_(mean, scale, None, None, loss, 1.0, case.reduction, k, b)
        return
    key = torch.empty(2, dtype=torch.uint64) if case.levels else None
    model = (case.likelihood, case.param, *clamp, 4.0, 1.0 / 255.0, 0.0, key, 3)
    options = (1.0, case.reduction, *model)
    if case.op == "likelihood_backward":
        ops.likelihood_backward(None, loss, x, mean, scale, mask, *options, False, True, True)
    elif case.op == "likelihood_forward":
        ops.likelihood_forward(x, mean, scale, mask, rows, rows, *options)
    else:
        g_scale = torch.empty_like(scale) if case.scale == "full" else None
        gradients = (torch.empty_like(mean), g_scale)
        ops.likelihood_forward_grad_(x, mean, scale, mask, rows, rows, *options, *gradients)


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
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=launch.options)


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == 1


# ---- taking it apart ---------------------------------------------------------------------------


@functools.cache
def tool(name: str) -> str:
    """Path of a CUDA binary tool that Triton ships."""
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__file__).parent / "bin" / name)


@dataclass
class Instruction:
    address: int
    text: str

    @property
    def opcode(self) -> str:
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0].rstrip(";")


def disassemble(cubin: bytes) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions, and the address of each label."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    instructions, labels, pending = [], {}, []
    for line in run.stdout.splitlines():
        if match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            address = int(match[1], 16)
            labels |= dict.fromkeys(pending, address)
            pending = []
            instructions.append(Instruction(address, match[2].strip()))
        elif match := re.match(r"(\.L_x_\w+):", line):
            pending.append(match[1])
    return instructions, labels


def executed(
    instructions: list[Instruction], labels: dict[str, int], trips: tuple[int, ...]
) -> int:
    """Instructions that one thread executes, its loops (outermost first) making ``trips`` trips."""
    # What follows the exit after the ticket is the last program's.
    ticket = [i.address for i in instructions if i.opcode.startswith("ATOMG")]
    if ticket:
        end = min(i.address for i in instructions if i.opcode == "EXIT" and i.address > ticket[0])
    else:
        end = max(i.address for i in instructions if i.opcode != "NOP" and not _is_trap(i, labels))
    weight = {i.address: 1 for i in instructions if i.address <= end}
    loops = []
    for i in instructions:
        target = re.search(r"\((\.L_x_\w+)\)", i.text)
        if i.address <= end and i.opcode == "BRA" and target and labels[target[1]] < i.address:
            loops.append((labels[target[1]], i.address))
    loops.sort(key=lambda loop: loop[0] - loop[1])  # outermost first
    trips = tuple(t for t in trips if t > 1)
    if len(loops) != len(trips):
        raise RuntimeError(f"{len(loops)} loops in the SASS, {len(trips)} in the launch")
    for (first, last), count in zip(loops, trips, strict=True):
        for address in weight:
            if first <= address <= last:
                weight[address] *= count
    return sum(weight[i.address] for i in instructions if i.address <= end and i.opcode != "NOP")


def _is_trap(i: Instruction, labels: dict[str, int]) -> bool:
    """Whether this is the jump to itself that ends every kernel."""
    target = re.search(r"\((\.L_x_\w+)\)", i.text)
    return i.opcode == "BRA" and target is not None and labels[target[1]] == i.address


def resources(cubin: bytes) -> int:
    """Registers per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("cuobjdump"), "-res-usage", file.name]
        run = subprocess.run(command, capture_output=True, text=True)
    return int(re.search(r"REG:(\d+)", run.stdout + run.stderr)[1])


def widths(instructions: list[Instruction], opcode: str) -> dict[int, int]:
    """Number of global accesses by width in bits."""
    counts: dict[int, int] = {}
    for i in instructions:
        if i.opcode.startswith(opcode):
            bits = re.search(r"\.(64|128|U8|S8|U16|S16)\b", i.opcode)
            width = int(bits[1].lstrip("US")) if bits else 32
            counts[width] = counts.get(width, 0) + 1
    return counts


def tile_converts(ttgir: str, rows: int) -> int:
    """Layout conversions of tensors with more to a row than the one or two sums over it."""
    shapes = re.findall(r"ttg\.convert_layout .*?: tensor<([\dx]+)x\D", ttgir)
    return sum(math.prod(map(int, shape.split("x"))) > 2 * rows for shape in shapes)


def audit(case: Case, target: str) -> Report:
    """Compile one case for one target and take it apart."""
    launch = record(case, TARGETS[target][0])
    compiled = compile_launch(launch, target)
    a = launch.arguments
    columns, tiles = a.get("COLS", a.get("SAMPLES")), a.get("TILES", 1)
    tile = f"{a['ROWS']}x{columns}x{tiles} w{launch.options['num_warps']}"
    report = Report(str(case), case.op, case.dtype, target, tile)
    report.shared = compiled.metadata.shared
    report.converts = tile_converts(compiled.asm["ttgir"], a["ROWS"] * tiles)
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        report.registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        spilled = re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text)
        report.spills = sum(map(int, spilled))
        return report

    instructions, labels = disassemble(compiled.asm["cubin"])
    report.registers = resources(compiled.asm["cubin"])
    # Every access to local memory: spills, and arrays indexed at run time.
    report.spills = sum(i.opcode.startswith(("LDL", "STL")) for i in instructions)
    report.loads, report.stores = widths(instructions, "LDG"), widths(instructions, "STG")
    kinds = ("BAR", "MEMBAR", "ATOMG", "CCTL", "EXIT")
    marks = (i for i in instructions if i.opcode.startswith(kinds) or ".STRONG." in i.opcode)
    report.ordering = [i.opcode for i in marks]
    if target == "sm_90":
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
            report.executed = executed(instructions, labels, trips)
        except RuntimeError as error:
            report.tile += f" ({error})"
        else:
            threads = 32 * launch.options["num_warps"]
            report.per_element = round(report.executed * threads / elements, 1)
    return report


def _audit(job: tuple[Case, str]) -> Report:
    return audit(*job)


def audit_all(cases: tuple[Case, ...] = CASES, workers: int | None = None) -> list[Report]:
    """Audit every case for each of its targets, in worker processes."""
    jobs = [(case, target) for case in cases for target in case.targets]
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(_audit, jobs))


def _width(counts: dict[int, int]) -> str:
    return " ".join(f"{n}x{width}" for width, n in sorted(counts.items(), reverse=True))


def main() -> None:
    """Print the audit as a table, or as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    args = parser.parse_args()
    reports = audit_all(tuple(c for c in CASES if args.only in str(c)))
    if args.json:
        json.dump([asdict(r) for r in reports], sys.stdout)
        return
    header = ("case", "target", "tile", "regs", "spills", "smem", "conv", "instr/el", "LDG", "STG")
    print(("{:52s} {:7s} {:16s}" + " {:>6s}" * 5 + "  {:18s} {}").format(*header))
    for r in reports:
        per_element = "" if r.per_element is None else f"{r.per_element:.1f}"
        print(
            f"{r.case:52s} {r.target:7s} {r.tile:16s} {r.registers:6d} {r.spills:6d} "
            f"{r.shared:6d} {r.converts:6d} {per_element:>6s}  "
            f"{_width(r.loads):18s} {_width(r.stores)}"
        )


if __name__ == "__main__":
    main()
