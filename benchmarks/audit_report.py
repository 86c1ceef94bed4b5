"""What the audit found, and what it means: the bound of each kernel, and the tables."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import sass

KERNELS = Path(__file__).parents[1] / "kernels" / "triton"

# Threads that each pipe of an sm_90 multiprocessor takes a cycle: table "Throughput of Native
# Arithmetic Instructions" of NVIDIA's guides, compute capability 9.0; where else they are found is
# in the text below. A load or store takes as many turns as it has 32-bit words, for L1 moves 128
# bytes a cycle.
RATES = {"issue": 128, "fp32": 128, "imad": 64, "alu": 64, "xu": 16, "fp64": 64, "lsu": 32}
SMS = 132
CLOCK = 1.755e9  # Hz, below the 1.98e9 that both boost to, as under load
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}  # B/s, of the SXM boards' data sheets


@dataclass
class Report:
    """What one compilation gave. ``None`` is for what the target has no such thing as.

    Attributes:
        tile, traits: what the heuristics chose, as ``_tile`` and ``_traits`` say.
        loads, stores: global accesses of a tile in SASS, by width in bits.
        executed: sm_90 instructions that one thread of a program executes.
        per_element: ``executed`` for each element, over the elements that exist.
        pipes: the same by the pipe that executes it; they sum to ``per_element``.
        words: 32-bit words that pass through the load/store unit for each element.
        bytes: memory traffic of an element: every tensor once, in each direction.
        converts: layout conversions of whole tiles through shared memory.
        narrow: strides along a row that are multiplied in 32 bits.
        ordering: barriers, fences and ticket, in the order of the SASS.
        approximate: the PTX instructions that are not exact.
        uncounted: why there is no ``executed``, if something kept it from being counted.
    """

    case: str
    op: str
    dtype: str
    target: str
    tile: str
    traits: str
    registers: int | None = None
    spills: int | None = None
    shared: int = 0
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)
    executed: int | None = None
    per_element: float | None = None
    pipes: dict[str, float] = field(default_factory=dict)
    words: float = 0.0
    bytes: float = 0.0
    converts: int = 0
    narrow: list[str] = field(default_factory=list)
    ordering: list[str] = field(default_factory=list)
    approximate: list[str] = field(default_factory=list)
    uncounted: str = ""

    def arithmetic(self) -> dict[str, float]:
        """Picoseconds that each pipe, and the issue of instructions, takes for an element."""
        threads = {**self.pipes, "issue": self.per_element, "lsu": self.words}
        threads["fp32"] += threads["imad"]  # they share the FMA pipe; imad has its heavy half alone
        return {name: 1e12 * threads[name] / (rate * SMS * CLOCK) for name, rate in RATES.items()}

    def memory(self, device: str) -> float:
        """Picoseconds that the memory traffic of an element takes."""
        return 1e12 * self.bytes / BANDWIDTH[device]


_PREFACE = """# What the Triton kernels compile to

Written without a GPU by `python -m benchmarks.audit --out benchmarks/results/audit`, with
{versions}. No figure here is a measured time.

## How to read it

The tile is rows x columns x tiles side by side, and a program's warps. Then registers a thread,
accesses to local memory (spills), bytes of shared memory, and loads and stores of global memory as
count x width in bits. Then, on sm_90, the instructions that an element costs, by the pipe that
executes them: FP32; integer and FP16 multiply-add (imad); integer, logic, compare and select (alu);
special functions and conversions (xu); FP64; loads, stores and shuffles (lsu); the uniform
datapath; branches, barriers and constants (other). What a program does once, and lanes without an
element, are shared out among the elements that exist.

The bound is a model: each pipe by itself, at its peak. H100 and H200 (SXM) have {sms}
multiprocessors, taken to run at {clock} GHz, as under load; they boost to 1.98. A cycle, one of
them takes so many threads: {rates}.
FP32 and imad share the FMA pipe, of which imad has one half. The load/store unit takes a turn for
each 32-bit word. Memory moves every tensor once in each direction, at {bandwidth}.
The columns H100 and H200 say what takes longest, and how many times as long memory takes as the
slowest pipe: above 1, a kernel waits for memory, if enough of it is in flight. A figure near 1
decides nothing: the model leaves out latencies, and what a clock and a memory reach in practice.
So it is with the latent forward pass in bf16: on an H200, rows of 1024 moved 0.90 times as fast as
a copy of as many bytes (../nvidia-h200), while they took 33.1 instructions an element, for which
the model says 1.12. They take fewer since.

The rates are those of NVIDIA's table "Throughput of Native Arithmetic Instructions" for compute
capability 9.0 (CUDA C++ Best Practices Guide; the programming guide before it), which was not at
hand to be read again. Found elsewhere: FP32 128, FP64 64 and 32-bit integers 64, in OpenXLA's
`cuda_core_info_table.cc`, which cites that table and NVIDIA's H100 whitepaper; special functions
16, in the FlashAttention-3 paper (3.9 TFLOPS of H100 SXM5: 16 · 132 · 1.83 GHz). Nowhere found for
9.0: that conversions take as long as special functions (the slowest of them do), that integers have
two pipes of 64 (alu and imad) side by side, and the load/store unit's 32 words. The issue of one
instruction a cycle by each of four schedulers is the architecture's.

"""

_SWEEP = """## Every configuration

The heuristics choose a tile, and with it how many warps. A kernel of its own is compiled where a
program makes several steps along a row, several passes over rows, or shares a row (steps, passes,
split), where no column needs a mask (even), and for each power of two, up to 16, that the rows'
first elements divide by (/1 to /16). Here is all that calls with contiguous tensors of up to
1,000,000 rows, 200,000 elements a row and 8 GiB of fp32 can get, each represented by the largest
call that gets it: in fp32 and bf16 on sm_90 all of it, and elsewhere, in fp64, and for the heavier
likelihoods each tile once. Then every likelihood with every scale, once as it is and once with
8-bit data, a mask and a soft clamp ("models"). `configurations.csv.gz` has them one by one, with
the instructions of each pipe.

Rows of whole vectors are those that begin at multiples of 16 bytes; the others stand apart. Access
is the width of the widest loads, the least of all. H100 and H200: how many wait for memory. Rows of
a few elements leave most lanes idle, and do not.

"""

_EXCEPTIONS = """## Exceptions

No kernel should spill; elements should move in 128 bits where rows begin at multiples of 16 bytes;
shared memory should serve sums alone; and the latent forward pass should cost 36 instructions an
element in fp32. Of every configuration above, these do not:

* Local memory: {spilling}. Of a latent pass in fp64 it is no spill but an array of libdevice's
  sine, for angles beyond any that occur.
* Narrower than 128 bits, rows of whole vectors: {narrow}. Not counted are data of 8 bits and masks,
  which move as many elements at once as their neighbours, and tiles that have less than 16 bytes
  for a thread: of rows too few or too short, and in bf16 of the logistic likelihood, and Student's
  t with a scale that is no exponential, for their registers. More than 100 instructions an element
  keep those from waiting for memory.
* Shared memory where nothing is summed, rows of whole vectors: {handed}. What is read once for a
  row passes through it to the threads that have the row.
* The same, other rows: {ragged}. Neighbouring threads read single elements, side by side, and pass
  them to the thread that makes the noise of four.
* Latent forward in fp32 above 36 instructions, rows that fill their tile: {dear}.
* The same, rows that leave lanes idle: {idle}.

"""

_ACCURACY = """## Accuracy of the approximate functions

On NVIDIA GPUs the kernels use PTX's approximate functions. These are bounds from documented
function errors, not measurements: the kernels' own device functions run in Triton's interpreter,
each approximate function giving the exact value moved by its error, in all combinations of up and
down, and with ways drawn for every single value, over a dense sample with the extremes of each
range. Beside each stands the error of the same in fp32 with exact functions. Where all means and
scales are stored in 16 bits, which rounds them by 2^-9 (bf16) or 2^-12 (fp16), e^x is made of fewer
instructions: that has bounds of its own.

An H200 was within the bounds of fp32, for every word of noise and every fp32 number of the ranges
(tests/test_approximations.py). Since then other instructions make e^(-x/4), τ where it is no
exponential, softplus, and the Bernoulli, logistic and Student t likelihoods: their bounds, and all
bounds of 16 bits, have not been compared with a GPU yet.

{documented}
The error of ε is absolute, and that of z in units of abs(μ) + σ. Errors of σ, of d(log σ)/ds, of
τ^(-1/2) and of the two terms of a KL are relative, and all others relative to the value or to 1,
whichever is more. σ goes from e^-40 to e^40, the root of 1/τ from e^-87 to e^87, and all else has τ
of e^-8 to e^8.

"""

_COLUMNS = "tile | regs | spills | smem | loads | stores"


def _width(counts: dict[int, int]) -> str:
    return " ".join(f"{n}x{width}" for width, n in sorted(counts.items(), reverse=True))


def _table(header: str, rows: Iterable[Iterable[object]]) -> str:
    names = header.split(" | ")
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _resources(r: Report) -> list[object]:
    return [r.tile, r.registers, r.spills, r.shared, _width(r.loads), _width(r.stores)]


def _slowest(r: Report) -> tuple[str, float]:
    """The pipe that takes longest for an element, and its picoseconds."""
    return max(r.arithmetic().items(), key=lambda item: item[1])


def _bound(r: Report, device: str) -> str:
    """What takes longest, and how many times as long memory takes as the slowest pipe."""
    pipe, time = _slowest(r)
    ratio = r.memory(device) / time
    return f"{'memory' if ratio >= 1.0 else pipe} {ratio:.2f}"


def align(r: Report) -> int:
    """What the rows' first elements divide by."""
    return int(r.traits.rpartition("/")[2])


def in_vectors(r: Report) -> bool:
    """Whether rows begin at multiples of 16 bytes."""
    return align(r) * {"float64": 8, "float32": 4}.get(r.dtype, 2) >= 16


#: Tensors whose elements a kernel reads and writes.
TENSORS = {
    "latent_forward": (2, 1),
    "latent_backward": (3, 2),
    "gaussian_kl_forward": (4, 0),
    "gaussian_kl_backward": (4, 4),
    "likelihood_forward": (3, 0),
    "likelihood_backward": (3, 2),
    "likelihood_forward_grad": (3, 2),
    "likelihood_rescale_": (2, 2),
}


def in_128_bits(r: Report) -> bool:
    """Whether every element of a call without options is read and written in 128 bits.

    Narrower accesses beside those are values of a row and of the noise key. Tiles with less than
    a vector to a thread are left out.
    """
    reads, writes = TENSORS[r.op]
    words = set(r.case.split())
    if words & {"bernoulli", "squared_error"}:  # no scale
        reads, writes = reads - 1, max(writes - 1, 0)
    if "event" in words:  # read once a program, and its gradient is summed
        reads, writes = reads - 1, writes - 1
    tile, warps = r.tile.split(" w")
    threads = int(warps) * (64 if r.target.startswith("gfx") else 32)
    size = {"float64": 8, "float32": 4}.get(r.dtype, 2)
    vectors = math.prod(map(int, tile.split("x"))) * size // (16 * threads)
    return r.loads.get(128, 0) >= reads * vectors and r.stores.get(128, 0) >= writes * vectors


def reduces(r: Report) -> bool:
    """Whether sums over elements are what a kernel is for: of a row, or for a shared scale."""
    backward = r.op.endswith(("backward", "rescale_"))
    return not backward or not {"scalar", "event", "row"}.isdisjoint(r.case.split())


def cases(reports: list[Report]) -> str:
    """On sm_90 with the instructions, then what other targets use."""
    rows = []
    for r in (r for r in reports if r.target == "sm_90"):
        counts = [r.uncounted] + [""] * (len(sass.PIPES) + 4)
        if r.per_element is not None:
            pipe, time = _slowest(r)
            counts = [r.per_element, *(f"{r.pipes[name]:.1f}" for name in sass.PIPES)]
            counts += [f"{time:.2f} {pipe}", f"{r.bytes:.1f}"]
            counts += [_bound(r, device) for device in BANDWIDTH]
        rows.append([r.case, *_resources(r), *counts])
    counts = " | ".join(("instr", *sass.PIPES, "ps, slowest", "bytes", *BANDWIDTH))
    others = [[r.case, r.target, *_resources(r)] for r in reports if r.target != "sm_90"]
    return (
        _table(f"case (sm_90) | {_COLUMNS} | {counts}", rows)
        + "\n"
        + _table(f"case | target | {_COLUMNS}", others)
    )


def _example(r: Report) -> str:
    """The arithmetic of one row in words."""
    threads = {**r.pipes, "issue": r.per_element, "lsu": r.words}
    threads["fp32"] = f"({r.pipes['fp32']} + {r.pipes['imad']})"
    pipe, time = _slowest(r)
    lines = [
        f"* {name}: {threads[name]} / ({RATES[name]} · {SMS} · {CLOCK:.4g} Hz) = {each:.2f} ps"
        for name, each in r.arithmetic().items()
    ]
    lines += [
        f"* {device}: {r.bytes:.2f} B / {BANDWIDTH[device]:.3g} B/s = {r.memory(device):.2f} ps, "
        f"{r.memory(device) / time:.2f} times the {time:.2f} ps of the slowest pipe, {pipe}"
        for device in BANDWIDTH
    ]
    return f"For example, an element of `{r.case}`:\n\n" + "\n".join(lines) + "\n"


def _span(values: Iterable[float]) -> str:
    values = sorted(values)
    return f"{values[0]} to {values[-1]}" if values else ""


def _configurations(sweep: dict[tuple[str, str, str, str], Report]) -> str:
    """Each kernel's configurations in one row; those in the CSV file one by one."""
    groups: dict[tuple[str, str, str], list[Report]] = {}
    for (name, target, *_), r in sweep.items():
        if re.search(r" \d+x\d+", name):
            name = f"{r.op} {r.dtype} models"
        vectors = "vectors" if in_vectors(r) else "others"
        groups.setdefault((name, target, vectors), []).append(r)
    rows = []
    for key, reports in groups.items():
        counted = [r for r in reports if r.per_element is not None]
        bound = [
            f"{sum(r.memory(device) >= _slowest(r)[1] for r in counted)} of {len(counted)}"
            for device in BANDWIDTH
        ]
        rows.append(
            [
                *(*key, len(reports), _span(r.registers for r in reports)),
                *(sum(r.spills > 0 for r in reports), max(r.shared for r in reports)),
                *(min(max(r.loads) for r in reports), _span(r.per_element for r in counted)),
                *(bound if counted else ("", "")),
            ]
        )
    counts = "instr | H100 | H200"
    return _table(
        f"kernel | target | rows of | configurations | regs | with spills | most smem | access "
        f"| {counts}",
        rows,
    )


def _some(reports: list[Report], value: Callable[[Report], str]) -> str:
    """How many there are, and the first three."""
    few = [f"`{r.case}` on {r.target} ({value(r)})" for r in reports[:3]]
    rest = [f"{len(reports) - 3} others"] if len(reports) > 3 else []
    return f"{len(reports)}: {', '.join(few + rest)}" if reports else "none"


def _exceptions(reports: list[Report]) -> str:
    """Whatever falls short of what is asked of the kernels."""
    fast = [r for r in reports if r.dtype != "float64"]
    narrow = [r for r in fast if in_vectors(r) and "levels" not in r.case and not in_128_bits(r)]
    shared = sorted((r for r in fast if r.shared and not reduces(r)), key=lambda r: -r.shared)
    kind = ("latent_forward", "float32", "sm_90")
    dear = [r for r in fast if (r.op, r.dtype, r.target) == kind and r.per_element > 36.0]
    dear.sort(key=lambda r: -r.per_element)
    return _EXCEPTIONS.format(
        spilling=_some([r for r in reports if r.spills], lambda r: f"{r.spills} accesses"),
        narrow=_some(narrow, lambda r: f"loads {_width(r.loads)}"),
        handed=_some([r for r in shared if in_vectors(r)], lambda r: f"{r.shared} bytes"),
        ragged=_some([r for r in shared if not in_vectors(r)], lambda r: f"{r.shared} bytes"),
        dear=_some([r for r in dear if "even" in r.traits], lambda r: str(r.per_element)),
        idle=_some([r for r in dear if "even" not in r.traits], lambda r: str(r.per_element)),
    )


def _documented(errors: dict[str, dict[str, Any]]) -> str:
    """The functions' errors, of the PTX ISA manual and, for logf, the CUDA programming guide."""
    return _table("function | documented error", errors["documented"].items())


def _accuracy(errors: dict[str, dict[str, Any]]) -> str:
    kinds = "bounds", "bounds of 16 bits", "exact"
    rows = ([name, *(f"{errors[kind][name]:.1e}" for kind in kinds)] for name in errors["bounds"])
    return _table("error of | bound | bound, 16 bits | with exact functions", rows)


def versions() -> str:
    """Of all that the figures depend on."""
    import triton

    ptxas, blackwell = sass.version("ptxas"), sass.version("ptxas-blackwell")
    return f"Triton {triton.__version__}, ptxas {ptxas} and, for sm_100, {blackwell}"


def write(
    folder: Path,
    reports: list[Report],
    sweep: dict[tuple[str, str, str, str], Report],
    errors: dict[str, dict[str, Any]],
) -> None:
    """Write audit.md, configurations.csv.gz, accuracy.json and sources.json."""
    folder.mkdir(parents=True, exist_ok=True)
    rates = ", ".join(f"{name} {rate}" for name, rate in RATES.items())
    bandwidth = " and ".join(f"{1e-12 * b:.3g} TB/s ({name})" for name, b in BANDWIDTH.items())
    preface = _PREFACE.format(
        versions=versions(), sms=SMS, clock=CLOCK / 1e9, rates=rates, bandwidth=bandwidth
    )
    first = next(r for r in reports if r.target == "sm_90")
    parts = (
        preface + _example(first),
        "## What each feature costs\n\n" + cases(reports),
        _SWEEP + _configurations(sweep),
        _exceptions(list(sweep.values())),
        _ACCURACY.format(documented=_documented(errors)) + _accuracy(errors),
    )
    (folder / "audit.md").write_text("\n".join(parts), encoding="utf-8")
    (folder / "accuracy.json").write_text(json.dumps(errors, indent=1) + "\n")
    (folder / "sources.json").write_text(json.dumps(sources(), indent=1) + "\n")
    table = io.StringIO()
    lines = csv.writer(table, lineterminator="\n")
    lines.writerow(COLUMNS)
    lines.writerows(_line(r, "case") for r in reports)
    lines.writerows(_line(r, "sweep") for r in sweep.values())
    packed = gzip.compress(table.getvalue().encode(), mtime=0)
    (folder / "configurations.csv.gz").write_bytes(packed)


def sources() -> dict[str, str]:
    """A digest of each file of the kernels, of all but its comments and empty lines.

    Without repeat.py, which launches again what the others compiled.
    """
    digests = {}
    for path in sorted(set(KERNELS.glob("*.py")) - {KERNELS / "repeat.py"}):
        lines = (line.rstrip() for line in path.read_text(encoding="utf-8").splitlines())
        code = "\n".join(line for line in lines if line and not line.lstrip().startswith("#"))
        digests[path.name] = hashlib.sha256(code.encode()).hexdigest()[:16]
    return digests


#: Of configurations.csv.gz: those of a Report, in JSON where they are no text or number.
COLUMNS = (
    *("part", "case", "op", "dtype", "target", "tile", "traits", "registers", "spills", "shared"),
    *("loads", "stores", "converts", "executed", "per_element", "pipes", "words", "bytes"),
    "narrow",
)


def _line(r: Report, part: str) -> list[object]:
    values = (getattr(r, name) for name in COLUMNS[1:])
    return [part, *(json.dumps(v) if isinstance(v, dict | list) else v for v in values)]


def read(folder: Path, part: str) -> list[Report]:
    """What ``write`` wrote: the reports of each "case", or those of the "sweep"."""
    types: dict[str, Callable[[str], Any]] = {
        **dict.fromkeys(("registers", "spills", "shared", "converts", "executed"), int),
        **dict.fromkeys(("per_element", "words", "bytes"), float),
        **dict.fromkeys(
            ("loads", "stores"), lambda t: {int(k): v for k, v in json.loads(t).items()}
        ),
        **dict.fromkeys(("pipes", "narrow"), json.loads),
    }
    with gzip.open(folder / "configurations.csv.gz", "rt", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line.pop("part") == part]
    return [
        Report(**{k: types.get(k, str)(v) if v else None for k, v in line.items()})
        for line in lines
    ]
