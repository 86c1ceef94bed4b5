# ruff: noqa: T201
"""Installs the package beside several versions of PyTorch and Triton, and without things; tests it.

    python tests/matrix.py [--all] [CELL ...]

For each cell a fresh virtual environment in .matrix/ and a fresh cache of compiled kernels, the
package installed as users do, with prebuilt kernels in some, and the FAST tests below, or all of
them with --all. Builds of PyTorch for GPUs need CUDA's libraries to be imported: some 6 GB for a
cell, and minutes. The exit status is 0 if all cells are well.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import venv
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".matrix"
# What another version may change: dispatch, autograd, torch.func, torch.compile, the C++ library
# for eager calls; and random calls of everything, on all backends.
FAST = (
    *("ops", "eager", "elbo", "autograd", "transforms", "compile", "repeat"),
    *("fuzz", "noise", "reference", "buffers", "cpu_kernels"),
)
WITHOUT_COMPILER = (
    "passes",
    "likelihoods",
    "noise",
    "reference",
    "elbo",
    "bad_input",
    "fuzz",
    "build",
)
# What those import. All tests need the extra "test".
PACKAGES = ("pytest", "hypothesis", "scipy", "scikit-learn", "setuptools", "ninja")
CHECK = """
import sys, warnings
import torch, vae_fast
from vae_fast import backends
assert "site-packages" in vae_fast.__file__, vae_fast.__file__
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    backend = backends.backend_for("cpu")
extension = backends.report()["extension"]
found = backend, backends.why_not("triton", "cpu"), extension.get("origin")
assert [str(fact) for fact in found] == sys.argv[1:], (found, sys.argv)
assert len(seen) == (backend == "reference"), seen
shortcut = extension.get("eager calls")
assert shortcut == (None if backend == "reference" else "in C++"), shortcut
"""


@dataclass
class Cell:
    """One environment, and what is to be found in it."""

    torch: str
    triton: str | None
    tests: tuple[str, ...] = FAST
    environment: dict[str, str] = field(default_factory=dict)
    backend: str = "cpp"
    options: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    prebuilt: bool = False  # compiled at installation, for every instruction set
    zig: str | None = None  # a version of the ziglang package, for the Clang in it


# Inductor, which takes $CXX for a program without options, would need this Clang's OpenMP, too.
OURS = ("-k", "not inductor")
CELLS = {
    "torch-2.14.1": Cell("2.14.1", "3.8.0"),
    "torch-2.13.0": Cell("2.13.0", "3.7.1"),
    "torch-2.12.1": Cell("2.12.1", "3.7.1"),
    # Triton 3.6's interpreter converts arrays of one element, which NumPy 2.4 refuses.
    "torch-2.11.0": Cell("2.11.0", "3.6.0", packages=("numpy<2.4",)),
    "torch-2.10.0": Cell("2.10.0", "3.6.0", packages=("numpy<2.4",)),
    "clang-22": Cell("2.13.0", "3.7.1", options=OURS, prebuilt=True, zig="0.17.1"),
    "clang-13": Cell("2.13.0", "3.7.1", options=OURS, zig="0.9.1"),
    "no-triton": Cell("2.13.0", None, prebuilt=True),
    "no-compiler": Cell(
        *("2.13.0", "3.7.1", WITHOUT_COMPILER, {"CXX": "no-such-compiler"}, "reference"),
        options=("-k", "not compile and not opcheck"),
    ),
}


def constraints():
    """The project's pins, but for what the cells choose."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    path = FOLDER / "constraints.txt"
    path.write_text(
        "\n".join(s for s in lines if not re.match(r"(torch|triton|numpy|setuptools)=", s))
    )
    return path


def install(folder, cell, everything, env):
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wanted = [*PACKAGES, *cell.packages, f"torch=={cell.torch}"]
    wanted += [f"triton=={cell.triton}"] if cell.triton else []
    wanted += [f"ziglang=={cell.zig}"] if cell.zig else []
    subprocess.run([*pip, "install", "--constraint", constraints(), *wanted], check=True)
    # From a copy: a build writes into the folder that it runs in.
    source = folder / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "runs", "_lib", "*.egg-info")
    )
    options = (
        ["--constraint", constraints(), f"{source}[test]"] if everything else ["--no-deps", source]
    )
    if cell.prebuilt:
        options.append("--no-build-isolation")
    env = env | ({"CXX": clang(folder)} if cell.zig else {})
    subprocess.run([*pip, "install", *options], env=env, check=True)
    if cell.triton is None:
        subprocess.run([*pip, "uninstall", "--yes", "triton"], check=True)
    return python, env


def clang(folder):
    """The command of the Clang in the ziglang package, as it is beside GCC's library and linker."""
    (zig,) = folder.glob("lib/python*/site-packages/ziglang")
    headers = f"-nobuiltininc -isystem {zig}/lib/include"
    target = f"--target={platform.machine()}-linux-gnu"
    return f"{zig}/zig clang --driver-mode=g++ {target} {headers} -Wno-unused-command-line-argument"


def run(name, cell, everything):
    """What pytest says at its end, and whether the cell is well."""
    folder = FOLDER / name
    left_out = ("PYTHONPATH", "VAE_FAST_BACKEND", "VAE_FAST_CXXFLAGS", "VIRTUAL_ENV")
    env = {n: v for n, v in os.environ.items() if n not in left_out} | cell.environment
    env |= {"TRITON_INTERPRET": "1", "VAE_FAST_CACHE": str(folder / "cache")}
    try:
        python, env = install(folder, cell, everything, env)
    except subprocess.CalledProcessError as error:
        return f"cannot be installed ({error})", False
    missing = "None" if cell.triton else "Triton is not installed"
    origin = "prebuilt" if cell.prebuilt else "built now" if cell.backend == "cpp" else "None"
    facts = (cell.backend, missing, origin)
    check = subprocess.run([python, "-c", CHECK, *facts], env=env, cwd=folder)
    if check.returncode != 0:
        return "is not what it should be", False
    tests = [f"tests/test_{test}.py" for test in cell.tests]
    if everything:
        tests = sorted(ROOT.glob("tests/test_*.py"))
    # "pytest", not "python -m pytest", which would find the package in the checkout.
    command = [folder / "bin" / "pytest", "-q", "-p", "no:cacheprovider", *cell.options, *tests]
    done = subprocess.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.strip().splitlines() or ["nothing was said"]
    (folder / "output.txt").write_text(done.stdout)
    if done.returncode != 0:
        print(*lines[-40:], sep="\n")
    return lines[-1].strip("= "), done.returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="all tests, not the fast ones alone")
    parser.add_argument("cells", nargs="*", metavar="CELL", help=f"of {', '.join(CELLS)}; or all")
    arguments = parser.parse_args()
    if unknown := set(arguments.cells) - set(CELLS):
        parser.error(f"no cell {', '.join(sorted(unknown))}; there are {', '.join(CELLS)}")
    FOLDER.mkdir(exist_ok=True)
    table = []
    for name in arguments.cells or CELLS:
        print(f"matrix: {name}", flush=True)
        started = time.monotonic()
        outcome, well = run(name, CELLS[name], arguments.all)
        cell = CELLS[name]
        seconds = f"{time.monotonic() - started:.0f} s"
        table.append(
            (name, cell.torch, cell.triton or "-", "ok" if well else "FAILED", seconds, outcome)
        )
    header = ("cell", "torch", "triton", "result", "time", "tests")
    widths = [max(len(row[i]) for row in (header, *table)) for i in range(len(header))]
    print()
    for row in (header, *table):
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
    return 0 if all(row[3] == "ok" for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
