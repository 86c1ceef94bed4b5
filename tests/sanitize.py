# ruff: noqa: T201
"""Runs a broad, fast part of the tests on C++ kernels built with AddressSanitizer and UBSan.

    python tests/sanitize.py [ISA ...]

for each instruction set (base, avx2, avx512; all that this machine has by default), in a process of
its own that ends at the first report. The libraries go to build/sanitize and are kept there. Linux,
with GCC or Clang.
"""

import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

from vae_fast import _build

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "sanitize"
FLAGS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize=vptr",  # torch's classes are not instrumented
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-g1",
    "-UVAE_FAST_X86_64_LEVEL",
)
# All of them in one library, as in a prebuilt one. What the kernels ask the processor for to choose
# their loops is answered at compile time: a name's fourth letter tells avx512f, avx512bw, ... from
# avx2, fma and bmi2.
ISAS = {
    "base": "-D__builtin_cpu_supports(name)=0",
    "avx2": "-D__builtin_cpu_supports(name)=((name)[3]!='5')",
    "avx512": "",
}
OPTIONS = {
    # Python does not free all it has; and torch, not instrumented, shares its containers with us.
    "ASAN_OPTIONS": "detect_leaks=0:detect_container_overflow=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "PYTHONMALLOC": "malloc",
    "VAE_FAST_BACKEND": "cpp",
    "VAE_FAST_FUZZ": "600",
    "OMP_NUM_THREADS": "2",
}
# Odd sizes, strides, empty tensors, samples, every family and dtype; random calls of it all; and of
# every call one with so much work that threads help each other.
TESTS = [
    *("tests/test_fuzz.py", "tests/test_cpu_kernels.py", "tests/test_passes.py"),
    *("tests/test_likelihoods.py", "tests/test_buffers.py", "tests/test_noise.py"),
    "tests/test_determinism.py",
]
# "triton": the interpreter; "argument": no kernel runs; "reused": the allocator keeps freed memory.
CHOICE = "not triton and not interpreted and not argument and not reused"

# -s: what is captured when a report ends the process would never be seen.
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-s", "-p", "no:cacheprovider"]


def compiler():
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def runtime(name):
    """The sanitizer's library, to be loaded before all others."""
    command = [*compiler(), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(path):
        sys.exit(f"sanitize: {shlex.join(compiler())} has no {name}")
    return os.path.realpath(path)


def here():
    """The instruction sets that this machine has."""
    if platform.machine() != "x86_64":
        return ["base"]
    levels = {"base": 1, "avx2": 3, "avx512": 4}
    return [isa for isa in ISAS if levels[isa] <= (_build.x86_64_level() or 1)]


def environment(isa, with_eager):
    flags = [*FLAGS, *filter(None, [ISAS[isa]])]
    env = os.environ | OPTIONS | {"VAE_FAST_CXXFLAGS": shlex.join(flags)}
    env["VAE_FAST_CACHE"] = str(CACHE)
    if not with_eager:
        env["VAE_FAST_CACHE"] = str(CACHE / isa)
    return env


# Builds both libraries before the sanitizers are in the process, which slow the compiler down; or,
# where one build of the shortcut for eager calls has been tested, only the kernels.
BUILD = """
import sys
from vae_fast import _build
if sys.argv[1] == "eager":
    if _build.build_eager() is None:
        sys.exit("the shortcut for eager calls could not be built")
else:
    target = _build.eager_target()
    failed = _build._entry(_build.cache_dir(), _build.source_key(target)).with_suffix(".failed")
    failed.parent.mkdir(parents=True, exist_ok=True)
    failed.write_text("left out by tests/sanitize.py\\n")
_build._load_library = lambda info: None  # which the sanitizers' own would have to precede
print(_build.load().path)
"""
USED = """
import sys, torch, vae_fast
from vae_fast import _build, backends, eager
assert backends.backend_for("cpu") == "cpp" and "sanitize" in str(_build.load().path)
assert (eager.shortcut() is not None) == (sys.argv[1] == "eager")
"""


def main(isas):
    if sys.platform != "linux":
        sys.exit("sanitize: only on Linux")
    available, times = here(), {}
    for isa in isas or reversed(available):
        if isa not in available:
            sys.exit(f"sanitize: this machine has {', '.join(available)}; not {isa}")
        started = time.monotonic()
        with_eager = isa == available[-1]
        env, mode = environment(isa, with_eager), "eager" if with_eager else "kernels"
        print(f"sanitize: {isa}: building", flush=True)
        subprocess.run([sys.executable, "-c", BUILD, mode], env=env, cwd=ROOT, check=True)
        env["LD_PRELOAD"] = f"{runtime('libasan.so')}:{runtime('libubsan.so')}"
        for command in (
            [sys.executable, "-c", USED, mode],
            [*PYTEST, "-k", CHOICE, *TESTS],
        ):
            done = subprocess.run(command, env=env, cwd=ROOT)
            if done.returncode != 0:
                sys.exit(f"sanitize: {isa}: failed (exit status {done.returncode})")
        times[isa] = time.monotonic() - started
    for isa, seconds in times.items():
        print(f"sanitize: {isa}: clean, {seconds:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
