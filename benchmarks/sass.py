"""Taking compiled NVIDIA kernels apart: instructions by pipe, loops, access widths, registers."""

from __future__ import annotations

import functools
import math
import re
import struct
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

#: What executes an instruction on sm_90, by the first part of its opcode. After the table of
#: pipelines in the guide of Nsight Compute; FP16 and integer multiply-add share the heavy half of
#: the FMA pipe. "other" are branches, barriers, fences and constant loads, which issue only.
PIPES = {
    "fp32": "FADD FFMA FMUL",
    "imad": "HADD2 HFMA2 HMUL2 HSET2 HSETP2 IDP IMAD IMUL",
    "alu": "BMSK CS2R F2FP FCHK FMNMX FSEL FSET FSETP HMNMX2 I2FP IABS IADD IADD3 ISETP LEA LOP3 "
    "MOV P2R PLOP3 PRMT R2P SEL SGXT SHF VABSDIFF VIADD VIADDMNMX VIMNMX",
    "xu": "BREV F2F F2I FLO FRND I2F I2I MUFU POPC",
    "fp64": "DADD DFMA DMNMX DMUL DSETP",
    "lsu": "ATOM ATOMG ATOMS LD LDG LDL LDS LDSM RED S2R SHFL ST STG STL STS STSM",
    "uniform": "R2UR REDUX S2UR VOTE VOTEU",  # and every name that starts with U
    "other": "BAR BMOV BRA BREAK BSSY BSYNC CALL CCTL CGAERRBAR DEPBAR ERRBAR EXIT LDC MEMBAR "
    "NANOSLEEP NOP RET WARPSYNC YIELD",
}
_PIPE_OF = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes.split()}


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address, target: in bytes from the kernel's start; where a branch goes, if it is one.
        text: with operands, and the predicate before it.
    """

    address: int
    text: str
    target: int | None = None

    @property
    def opcode(self) -> str:
        """The opcode with its suffixes."""
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0]

    @property
    def pipe(self) -> str:
        """What executes it on sm_90, a key of ``PIPES``."""
        name = self.opcode.split(".")[0]
        return "uniform" if name.startswith("U") else _PIPE_OF[name]

    @property
    def words(self) -> int:
        """32-bit words that a thread moves through the load/store unit; 1 for narrower ones."""
        width = re.search(r"\.(64|128)\b", self.opcode)
        return int(width[1]) // 32 if width else 1


@functools.cache
def tool(name: str) -> str:
    """Path of a CUDA binary tool that Triton ships."""
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__file__).parent / "bin" / name)


def version(name: str) -> str:
    """The release of a tool, "12.8.93" say."""
    run = subprocess.run([tool(name), "--version"], capture_output=True, text=True, check=True)
    return re.search(r"\bV(\d[\d.]+)", run.stdout)[1]


def _code(cubin: bytes) -> bytes:
    """The one kernel's machine code: the ELF section .text.<kernel>."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    name_at = headers[names][4]
    (code,) = (
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in headers
        if cubin.startswith(b".text.", name_at + name)
    )
    return code


def disassemble(cubins: list[bytes], architecture: str) -> list[list[Instruction]]:
    """The instructions of each kernel, all of one ``architecture``, "SM90a" say.

    The disassembler takes a third of a second to start, so it is started once for all of them.
    """
    codes = [_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        command = [tool("nvdisasm"), "-c", "-b", architecture, file.name]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", run.stdout, re.M)
    kernels, start = [], 0
    for code in codes:
        count = sum(int(address, 16) < start + len(code) for address, _ in lines)
        kernels.append(
            [_instruction(int(address, 16), text, start) for address, text in lines[:count]]
        )
        lines, start = lines[count:], start + len(code)
    return kernels


def _instruction(address: int, text: str, start: int) -> Instruction:
    branch = re.search(r"\bBRA .*?0x([0-9a-f]+)$", text)
    return Instruction(address - start, text, int(branch[1], 16) - start if branch else None)


def registers(cubin: bytes) -> int:
    """Registers per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("cuobjdump"), "-res-usage", file.name]
        run = subprocess.run(command, capture_output=True, text=True)
    return int(re.search(r"REG:(\d+)", run.stdout + run.stderr)[1])


def widths(kernel: list[Instruction], opcode: str) -> dict[int, int]:
    """Number of global accesses by width in bits."""
    counts: Counter[int] = Counter()
    for i in kernel:
        if i.opcode.startswith(opcode):
            bits = re.search(r"\.(64|128|[US](?:8|16))\b", i.opcode)
            counts[int(bits[1].lstrip("US")) if bits else 32] += 1
    return dict(counts)


def amd_widths(assembly: str, access: str) -> dict[int, int]:
    """The same from AMD's assembly; ``access`` is "load" or "store"."""
    name = rf"\b(?:buffer|flat|global)_{access}_(dword(?:x\d)?|\w*short|\w*byte)"
    dwords = re.findall(name, assembly)
    bits = {"dword": 32, "short": 16, "byte": 8}
    names = (re.fullmatch(r".*?(dword|short|byte)(?:x(\d))?", name) for name in dwords)
    return dict(Counter(bits[name[1]] * int(name[2] or 1) for name in names))


def executed(kernel: list[Instruction], trips: tuple[int, ...]) -> list[tuple[Instruction, int]]:
    """What a thread of a program that is not the last to finish executes, and how often.

    Args:
        trips: of its loops, the outermost first.
    """
    # What follows the exit after the ticket is the last program's.
    ticket = [i.address for i in kernel if i.opcode.startswith("ATOMG")]
    if ticket:
        end = min(i.address for i in kernel if i.opcode == "EXIT" and i.address > ticket[0])
    else:  # all but the jump to itself that ends every kernel
        end = max(i.address for i in kernel if i.opcode != "NOP" and i.target != i.address)
    body = [i for i in kernel if i.address <= end and i.opcode != "NOP"]
    loops = [(i.target, i.address) for i in body if i.target is not None and i.target < i.address]
    loops.sort(key=lambda loop: loop[0] - loop[1])  # outermost first
    trips = tuple(t for t in trips if t > 1)
    if len(loops) != len(trips):
        raise ValueError(f"{len(loops)} loops in the SASS, {len(trips)} in the launch")
    counts = []
    for i in body:
        inside = [n for (a, b), n in zip(loops, trips, strict=True) if a <= i.address <= b]
        counts.append((i, math.prod(inside)))
    return counts
