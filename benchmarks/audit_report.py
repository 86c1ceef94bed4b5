"""What the audit found, and what it means: the bound of each kernel, and the tables."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import sass

# Threads that each pipe of an sm_90 multiprocessor takes a cycle: table "Throughput of Native
# Arithmetic Instructions" of the CUDA programming guide, compute capability 9.0. A load or store
# takes as many turns as it has 32-bit words, for L1 moves 128 bytes a cycle.
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
multiprocessors, taken to run at {clock} GHz. A cycle, one of them takes so many threads: {rates}
(CUDA programming guide, "Throughput of Native Arithmetic Instructions", compute capability 9.0; the
pipes are those of the guide of Nsight Compute). FP32 and imad share the FMA pipe, of which imad has
one half. The load/store unit takes a turn for each 32-bit word. Memory moves every tensor once in
each direction, at {bandwidth}. The columns H100 and H200 say what takes longest, and how many
times as long memory takes as the slowest pipe: above 1, a kernel waits for memory, if enough of it
is in flight.

"""

_SWEEP = """## Every configuration

The heuristics choose a tile, and with it how many warps. A kernel of its own is compiled where a
program makes several steps along a row, several passes over rows, or shares a row (steps, passes,
split), where no column needs a mask (even), and where rows start at multiples of 16 elements
(aligned). Here is all that calls of up to 1,000,000 rows, 200,000 elements a row and 8 GiB of fp32
can get, each represented by the largest call that gets it: in fp32 and bf16 on sm_90 all of it,
elsewhere and for the heavier likelihoods each tile once. `configurations.csv` has them one by one.

Access is the width of the widest loads, the least of all aligned rows; where few rows or short ones
give a thread less than 16 bytes, it is narrower. H100 and H200: how many wait for memory. Rows of a
few elements leave most lanes idle, and do not.

"""

_ACCURACY = """## Accuracy of the approximate functions

On NVIDIA GPUs the fp32 kernels use PTX's approximate functions. These are bounds from documented
function errors, not measurements: the kernels' own device functions run in Triton's interpreter,
each approximate function giving the exact value moved by its error, in all combinations of up and
down, over a dense sample with the extremes of each range. Beside each stands the error of the same
in fp32 with exact functions. They have not been compared with a GPU yet.

{documented}
The error of ε is absolute, and that of z in units of abs(μ) + σ. Errors of σ, of d(log σ)/ds and of
the two terms of a KL are relative, and all others relative to the value or to 1, whichever is more.
σ goes from e^-40 to e^40, and τ from e^-8 to e^8.

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
    rows = []
    for (name, target), group in itertools.groupby(sweep.items(), key=lambda item: item[0][:2]):
        reports = [r for _, r in group]
        counted = [r for r in reports if r.per_element is not None]
        wide = [max(r.loads) for r in reports if r.loads and "aligned" in r.traits]
        bound = [
            f"{sum(r.memory(device) >= _slowest(r)[1] for r in counted)} of {len(counted)}"
            for device in BANDWIDTH
        ]
        rows.append(
            [
                *(name, target, len(reports), _span(r.registers for r in reports)),
                *(sum(r.spills > 0 for r in reports), max(r.shared for r in reports)),
                *(min(wide, default=""), _span(r.per_element for r in counted)),
                *(bound if counted else ("", "")),
            ]
        )
    counts = "instr | H100 | H200"
    return _table(
        f"kernel | target | configurations | regs | with spills | most smem | access | {counts}",
        rows,
    )


def _documented(errors: dict[str, dict[str, Any]]) -> str:
    """The functions' errors, of the PTX ISA manual and, for logf, the CUDA programming guide."""
    return _table("function | documented error", errors["documented"].items())


def _accuracy(errors: dict[str, dict[str, Any]]) -> str:
    rows = (
        [name, f"{bound:.1e}", f"{errors['exact'][name]:.1e}"]
        for name, bound in errors["bounds"].items()
    )
    return _table("error of | bound | with exact functions", rows)


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
    """Write audit.md, configurations.csv and accuracy.json."""
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
        _ACCURACY.format(documented=_documented(errors)) + _accuracy(errors),
    )
    (folder / "audit.md").write_text("\n".join(parts), encoding="utf-8")
    (folder / "accuracy.json").write_text(json.dumps(errors, indent=1) + "\n")
    with (folder / "configurations.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows(map(_line, sweep.values()))


COLUMNS = (
    *("case", "target", "tile", "traits", "registers", "spills", "shared", "loads", "stores"),
    *("instructions", "bytes", "slowest", "picoseconds", *BANDWIDTH),
)


def _line(r: Report) -> list[object]:
    """A line of configurations.csv."""
    counts = [""] * (4 + len(BANDWIDTH))
    if r.per_element is not None:
        pipe, time = _slowest(r)
        counts = [r.per_element, f"{r.bytes:.1f}", pipe, f"{time:.2f}"]
        counts += [f"{r.memory(device) / time:.2f}" for device in BANDWIDTH]
    tile, *resources = _resources(r)
    return [r.case, r.target, tile, r.traits, *resources, *counts]
