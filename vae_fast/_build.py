"""Builds and finds the C++ (CPU) kernels.

The one place that knows their sources, flags, compiler, build key and cache folder. The library is
written against PyTorch's stable ABI, so one binary serves every torch from 2.10 on. It comes from
one of three places, in this order:

1. *prebuilt*: ``setup.py`` compiled it into ``vae_fast/_lib`` (if torch was importable then), for
   every instruction set, so that it may go to other machines: a minute or two on two cores;
2. *cached*: an earlier process compiled it into the cache folder, ``$VAE_FAST_CACHE`` or a default;
3. *built now*: compiled into the cache folder, once, at first use, for this machine's instruction
   set alone, which is part of the key: machines that share the folder do not mix theirs up.

A library is used only if it was made from the very sources and flags that this package has now.
``$CXX`` chooses the compiler. ``$VAE_FAST_CXXFLAGS`` adds flags, quoted as in a shell, to every
compilation and link, after the others and as part of the key: sanitizers, say (``make sanitize``).

A second library, the shortcut for eager calls, holds no kernels but needs torch's unstable C++
interface. It is never prebuilt, always for the torch and Python at hand, and can be done without.

``setup.py`` runs this file by its path, before the package or torch can be imported: it needs
nothing beyond the standard library until :func:`load` hands the library to torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import importlib.util
import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType

__all__ = [
    "BuildError",
    "BuildInfo",
    "build_eager",
    "cache_dir",
    "can_build",
    "compile_into",
    "find",
    "load",
    "load_eager",
    "source_key",
    "why_no_eager",
]

logger = logging.getLogger("vae_fast.build")

PACKAGE_DIR = Path(__file__).resolve().parent
HEADER_SUFFIXES = (".h", ".hpp")
_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
LIB_NAME = "libvae_fast_cpu" + _SUFFIX
INFO_NAME = "build.json"
PREBUILT_DIR = "_lib"  # inside the package; not a package itself

# Symbols up to torch 2.10 may be used and none from later, so that one binary serves them all.
DEFINES = ("-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-DPy_LIMITED_API=0x030a0000")
# No -march: only the kernels' loops are for an instruction set, which they choose when they run.
# No -ffast-math: NaN and infinity must survive.
CXX_FLAGS = (
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    "-Wno-psabi",  # wide vectors are passed only between functions that are inlined
    *DEFINES,
)
# Python's symbols are in the process that loads the library.
LINK_FLAGS = ("-shared", *(("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()))
LOCK_TIMEOUT_S = 600.0
FAILURE_KEPT_S = (
    3600.0  # trying takes seconds, in every process; but what is missing may be installed
)
# The features by which the kernels choose (cpu.cpp), best first, by level of the x86-64 psABI.
X86_64_LEVELS = {
    4: {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    3: {"avx2", "fma", "bmi2", "f16c"},
    1: set(),
}


@dataclass(frozen=True)
class Target:
    """A library to build."""

    lib_name: str
    sources: tuple[str, ...]  # compiled; every header beside them counts as a source too
    libraries: tuple[str, ...]  # of torch's
    cxx_flags: tuple[str, ...] | None = None  # None: CXX_FLAGS
    facts: tuple[str, ...] = ()  # of this process, for which alone the library is made


KERNELS = Target(
    LIB_NAME,
    ("cpu.cpp", "latent.cpp", "likelihood.cpp", "objective.cpp", "ops.cpp", "stored.cpp"),
    ("torch_cpu",),
)


def native_kernels() -> Target:
    """The kernels for this machine's instruction set alone; for all if it cannot be told."""
    level = x86_64_level()
    return KERNELS if level is None else _for_level(level)


def _for_level(level: int) -> Target:
    return replace(KERNELS, cxx_flags=(*CXX_FLAGS, f"-DVAE_FAST_X86_64_LEVEL={level}"))


@lru_cache(maxsize=1)
def x86_64_level() -> int | None:
    """The highest of ``X86_64_LEVELS`` that every core here has; None but on x86-64 Linux.

    Linux lists the features, and PyTorch, asking the processor itself, must agree: an emulator may
    lack some of those of the machine that it runs on.
    """
    if platform.machine() != "x86_64":
        return None
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    cores = [set(line.split()) for line in lines if line.startswith("flags")]
    if not cores:
        return None
    import torch

    here = set.intersection(*cores)
    listed = next(level for level, features in X86_64_LEVELS.items() if features <= here)
    asked = torch.backends.cpu.get_cpu_capability()
    return min(listed, 4 if asked.startswith("AVX512") else 3 if asked.startswith("AVX2") else 1)


def eager_target() -> Target:
    """The shortcut for eager calls (``eager.cpp``), made for this very torch and Python."""
    import torch

    return Target(
        "vae_fast_eager" + _SUFFIX,
        ("eager.cpp",),
        ("c10", "torch_cpu", "torch_python"),
        ("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden"),
        (torch.__version__, torch.__file__, sys.version, sysconfig.get_config_var("SOABI") or ""),
    )


class BuildError(RuntimeError):
    """The C++ kernels could not be compiled or loaded; the message says why.

    After a failed compilation it ends with what the compiler said, from its first error on.
    """


class _Rejected(BuildError):
    """The compiler found errors in the sources, and would find them again."""


@dataclass(frozen=True)
class BuildInfo:
    """One compiled library and where it came from."""

    path: Path  #: the shared library
    origin: str  #: "prebuilt", "cached" or "built now"
    key: str  #: hash of the sources, the flags and the target machine
    compiler: str  #: first line of what the compiler says of its version
    flags: tuple[str, ...]  #: compiler and linker flags, without folders
    seconds: float  #: how long the compilation took, whenever it was


# ------------------------------------------------------------------------------------------------
# What is compiled: sources, flags, keys
# ------------------------------------------------------------------------------------------------


def csrc_dir() -> Path:
    """The folder of the C++ sources: in an installed wheel, or beside the package in a checkout."""
    places = (PACKAGE_DIR / "_csrc", PACKAGE_DIR.parent / "kernels" / "csrc")
    for place in places:
        if (place / KERNELS.sources[0]).is_file():
            return place
    raise BuildError(
        f"no {KERNELS.sources[0]} in " + " nor in ".join(str(place) for place in places)
    )


def _source_files(target: Target) -> list[Path]:
    """Everything whose contents decide what the library does, in a fixed order."""
    folder = csrc_dir()
    headers = sorted(path for path in folder.iterdir() if path.suffix in HEADER_SUFFIXES)
    return [*(folder / name for name in target.sources), *headers]


def _extra_flags() -> tuple[str, ...]:
    """The flags in ``$VAE_FAST_CXXFLAGS``."""
    try:
        return tuple(shlex.split(os.environ.get("VAE_FAST_CXXFLAGS", "")))
    except ValueError as error:
        raise BuildError(f"cannot read VAE_FAST_CXXFLAGS: {error}") from error


def _compile_flags(target: Target) -> tuple[str, ...]:
    return (*(CXX_FLAGS if target.cxx_flags is None else target.cxx_flags), *_extra_flags())


def flags(target: Target = KERNELS) -> tuple[str, ...]:
    """Compiler and linker flags, without include and library folders."""
    return (*_compile_flags(target), *LINK_FLAGS)


def source_key(target: Target = KERNELS) -> str:
    """Hash of the sources, the flags and the target machine, 16 hex digits.

    A library with another key must not be used. The kernels' key does not depend on the compiler,
    nor on which torch is installed: the stable ABI makes them serve every torch from 2.10 on.
    """
    digest = hashlib.sha256()
    for fact in (sys.platform, platform.machine(), *flags(target), *target.facts):
        digest.update(fact.encode() + b"\0")
    try:
        for path in _source_files(target):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    except OSError as error:
        raise BuildError(f"cannot read the C++ sources: {error}") from error
    return digest.hexdigest()[:16]


@lru_cache(maxsize=8)
def _compiler_version(command: tuple[str, ...]) -> str:
    """First line of ``compiler --version``; raises BuildError if it cannot be run."""
    try:
        done = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
    except OSError as error:
        raise BuildError(f"cannot run the C++ compiler {shlex.join(command)}: {error}") from error
    text = (done.stdout + done.stderr).strip()
    if done.returncode != 0 or not text:
        what = f"{shlex.join(command)} --version exited with status {done.returncode}"
        raise BuildError(f"{what}: {_excerpt(text, 5)}")
    return text.splitlines()[0].strip()


def find_compiler() -> tuple[tuple[str, ...], str]:
    """The C++ compiler's command and its version line.

    ``$CXX``, which may hold options too, else the first of c++, g++ and clang++ on the PATH.
    """
    if sys.platform == "win32":
        raise BuildError("the C++ kernels are not built on Windows")
    wanted = os.environ.get("CXX", "").strip()
    if wanted:
        try:
            program, *options = shlex.split(wanted)
        except ValueError as error:
            raise BuildError(f"cannot read CXX={wanted!r}: {error}") from error
        if shutil.which(program) is None:
            raise BuildError(f"no C++ compiler: CXX={wanted!r} names a program that is not there")
        if os.path.dirname(program):  # it runs in another folder
            program = os.path.abspath(program)
        command = program, *options
        return command, _compiler_version(command)
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return (found,), _compiler_version((found,))
    raise BuildError(
        "no C++ compiler: none of c++, g++ and clang++ is on the PATH, and CXX is not set"
    )


def _toolchain_key() -> str:
    """Hash of what may change the binary without changing what it should do; 8 hex digits."""
    (_, *options), compiler = find_compiler()
    libc = ""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not glibc
        libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
    facts = "\0".join((compiler, libc, *options))
    return hashlib.sha256(facts.encode()).hexdigest()[:8]


def _torch_dir() -> Path:
    """Where torch is installed, found without importing it (that takes seconds)."""
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(
            "torch is not importable, and its headers are needed to compile the C++ kernels"
        )
    folder = Path(next(iter(spec.submodule_search_locations))).resolve()
    if not (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise BuildError(f"torch in {folder} has no stable-ABI headers: torch >= 2.10 is needed")
    return folder


def can_build() -> str | None:
    """None if sources, torch's headers and a compiler are all here, else the reason why not."""
    try:
        source_key()
        _torch_dir()
        find_compiler()
    except BuildError as error:
        return str(error)
    return None


# ------------------------------------------------------------------------------------------------
# Compiling
# ------------------------------------------------------------------------------------------------


def _commands(compiler: tuple[str, ...], target: Target) -> list[tuple[str, list[str], list[str]]]:
    """(output, inputs, command) of every step; outputs are relative to the working folder."""
    torch_dir, csrc = _torch_dir(), csrc_dir()
    include = [
        f"-I{torch_dir / 'include'}",
        f"-I{torch_dir / 'include' / 'torch' / 'csrc' / 'api' / 'include'}",
        f"-I{sysconfig.get_path('include')}",
    ]
    steps, objects = [], []
    compile_flags = _compile_flags(target)
    for name in target.sources:
        source, output = str(csrc / name), f"{Path(name).stem}.o"
        steps.append(
            (output, [source], [*compiler, *compile_flags, *include, "-c", source, "-o", output])
        )
        objects.append(output)
    lib = torch_dir / "lib"
    # torch is in the process before the library is: only macOS's loader needs an rpath.
    rpath = [f"-Wl,-rpath,{lib}"] if sys.platform == "darwin" else []
    libraries = [f"-L{lib}", *(f"-l{name}" for name in target.libraries)]
    link = [*compiler, *LINK_FLAGS, *_extra_flags(), *objects, "-o", target.lib_name]
    link += [*libraries, *rpath]
    steps.append((target.lib_name, objects, link))
    return steps


def _find_ninja() -> str | None:
    """The ``ninja`` of the Python package of that name, else the one on the PATH."""
    folders = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)))
    return shutil.which("ninja", path=folders)


def _ninja_file(steps: list[tuple[str, list[str], list[str]]]) -> str:
    def path(text: str) -> str:
        return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        "ninja_required_version = 1.3",
        "rule run",
        "  command = $cmd",
        "  description = $out",
        "",
    ]
    for output, inputs, command in steps:
        lines.append(f"build {path(output)}: run {' '.join(path(name) for name in inputs)}")
        lines.append(f"  cmd = {shlex.join(command).replace('$', '$$')}")
    return "\n".join([*lines, ""])


def _excerpt(output: str, limit: int = 40) -> str:
    """At most ``limit`` lines: from the first error on if the output names one, else the last."""
    lines = output.strip().splitlines()
    first = next((i for i, line in enumerate(lines) if "error:" in line), None)
    start = max(len(lines) - limit, 0) if first is None else min(first, max(len(lines) - limit, 0))
    kept = lines[start : start + limit]
    before = ["..."] if start > 0 else []
    after = ["..."] if start + limit < len(lines) else []
    return "\n".join([*before, *kept, *after])


# What a compiler calls an error, too, but not one of the sources: a full disk, no memory.
_PASSING = ("No space left", "Killed", "out of memory", "Cannot allocate memory", "interrupted by")


def _run(command: list[str], folder: Path) -> None:
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"LC_ALL": "C"},  # an error is one in English
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise BuildError(f"cannot run {command[0]}: {error}") from error
    with process:
        try:
            output, _ = process.communicate()
        except BaseException:  # Ctrl-C: ninja stops its compilers, which it cannot if it is killed
            process.terminate()
            process.communicate()
            raise
    if process.returncode != 0:
        what = f"{Path(command[0]).name} exited with status {process.returncode}"
        rejected = "error:" in output and not any(reason in output for reason in _PASSING)
        raise (_Rejected if rejected else BuildError)(
            f"compiling the C++ kernels failed ({what}):\n{_excerpt(output)}"
        )


def compile_into(folder: Path, target: Target = KERNELS) -> BuildInfo:
    """Compiles the library and its record into ``folder``, which must exist, and describes it.

    Raises BuildError: no compiler, no torch headers, or what the compiler said.
    """
    started = time.perf_counter()
    compiler, version = find_compiler()
    key = source_key(target)
    steps = _commands(compiler, target)
    ninja = _find_ninja()
    try:
        with tempfile.TemporaryDirectory(prefix="vae_fast-") as work_name:
            work = Path(work_name)
            if ninja is not None:
                (work / "build.ninja").write_text(_ninja_file(steps))
                _run([ninja], work)
            else:
                for _, _, command in steps:
                    _run(command, work)
            shutil.copy2(work / target.lib_name, folder / target.lib_name)
        info = BuildInfo(
            path=folder / target.lib_name,
            origin="built now",
            key=key,
            compiler=version,
            flags=flags(target),
            seconds=round(time.perf_counter() - started, 3),
        )
        record = asdict(info) | {"path": target.lib_name, "bytes": info.path.stat().st_size}
        (folder / INFO_NAME).write_text(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise BuildError(f"cannot write the compiled C++ kernels: {error}") from error
    return info


# ------------------------------------------------------------------------------------------------
# Finding and keeping
# ------------------------------------------------------------------------------------------------


def _read(folder: Path, origin: str, key: str, target: Target = KERNELS) -> BuildInfo | None:
    """The library in ``folder``; None if it is not there, not whole, or of another key."""
    try:
        record = json.loads((folder / INFO_NAME).read_text())
        info = BuildInfo(
            path=folder / target.lib_name,
            origin=origin,
            key=str(record["key"]),
            compiler=str(record["compiler"]),
            flags=tuple(record["flags"]),
            seconds=float(record["seconds"]),
        )
        # Loading a file that was cut short can end the process, with a bus error.
        whole = info.path.stat().st_size == int(record["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if info.key != key:
        logger.info("ignoring %s: it was built from other sources or flags", info.path)
        return None
    return info if whole else None


def cache_dir() -> Path:
    """``$VAE_FAST_CACHE``, else ``vae_fast`` in the user's cache folder; it need not exist."""
    if wanted := os.environ.get("VAE_FAST_CACHE", "").strip():
        with contextlib.suppress(RuntimeError):  # ~ of a user without a home folder
            return Path(wanted).expanduser().absolute()
        return _temporary_cache_dir()
    if sys.platform != "darwin" and (xdg := os.environ.get("XDG_CACHE_HOME", "").strip()):
        return Path(xdg).absolute() / "vae_fast"
    try:
        home = Path.home()
    except RuntimeError:  # a user without a home folder
        return _temporary_cache_dir()
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "vae_fast"


def _temporary_cache_dir() -> Path:
    """This user's own folder among the temporary ones; a new one each time if its name is taken."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"vae_fast-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
        # Anyone can make folders there: load nothing from one that others own or may change.
        if (
            not folder.is_symlink()
            and facts.st_uid == user
            and not facts.st_mode & 0o022
            and _writable(folder)
        ):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="vae_fast-"))


def _writable(folder: Path) -> bool:
    """Whether libraries can be written to a folder, and loaded from it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            no_code = getattr(os, "ST_NOEXEC", 0)
            return not (no_code and os.statvfs(folder).f_flag & no_code)
    except OSError:
        return False


def _entry(root: Path, key: str) -> Path:
    """The folder in the cache of what the compiler at hand makes.

    Beside it, with the suffix ``.failed``, is what the compiler said if it rejected the sources.
    """
    return root / f"{key}-{_toolchain_key()}"


def _cached(root: Path, target: Target) -> Iterator[BuildInfo]:
    """What the compiler at hand made; without one, whatever was made from these sources."""
    key = source_key(target)
    try:
        entries = [_entry(root, key)]
    except BuildError:
        entries = sorted(root.glob(f"{key}-????????"))
    for entry in entries:
        if info := _read(entry, "cached", key, target):
            yield info


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds an advisory lock on ``path``, if it can.

    It only saves work done twice: what makes concurrent builds safe is the atomic rename.
    """
    try:
        import fcntl

        file = path.open("a")
    except (ImportError, OSError):
        yield
        return
    with file:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    logger.warning("waiting for another process that compiles the C++ kernels")
                waiting = True
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        yield


def _build_cached(root: Path, key: str, target: Target) -> BuildInfo:
    """Compiles into the cache folder ``root``, unless another process has just done so."""
    entry = _entry(root, key)
    failure = entry.with_suffix(".failed")
    began = time.time()
    with _lock(root / f"{key}.lock"):
        if info := _read(entry, "cached", key, target):
            return info
        with contextlib.suppress(OSError):
            failed = failure.stat().st_mtime
            if failed >= began:  # in the process that had the lock
                raise BuildError(failure.read_text().strip())
            if time.time() - failed < FAILURE_KEPT_S:
                raise BuildError(
                    f"{target.lib_name} could not be compiled before: {failure} says why; an hour "
                    "later, or without that file, it is tried again"
                )
        _sweep(root)
        compiler = find_compiler()[1]
        # Seen without any set-up: a program that stands still for no reason is a broken one.
        level = logging.WARNING if target.lib_name == LIB_NAME else logging.INFO
        what = "compiling %s with %s, which takes a minute or so, once; kept in %s"
        logger.log(level, what, target.lib_name, compiler, entry)
        try:
            scratch = root / f".building-{os.getpid()}-{uuid.uuid4().hex[:8]}"
            scratch.mkdir()
        except OSError as error:
            raise BuildError(f"cannot write to the cache folder {root}: {error}") from error
        try:
            info = compile_into(scratch, target)
            if info.key != key:
                raise BuildError("the C++ sources changed while they were being compiled")
            try:
                scratch.rename(entry)
            except (
                OSError
            ):  # the entry is there: another process's, as good as ours, or a broken one
                if other := _read(entry, "cached", key, target):
                    return other
                shutil.rmtree(entry, ignore_errors=True)
                scratch.rename(entry)
        except _Rejected as error:
            with contextlib.suppress(OSError):
                failure.write_text(f"{error}\n")
            raise
        except OSError as error:
            raise BuildError(f"cannot write to the cache folder {root}: {error}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    logger.info("built %s in %.1f s", target.lib_name, info.seconds)
    return replace(info, path=entry / target.lib_name)


def _sweep(root: Path) -> None:
    """Delete what builds left that were killed, a day ago or more."""
    for scratch in root.glob(".building-*"):
        with contextlib.suppress(OSError):
            if time.time() - scratch.stat().st_mtime > 86400.0:
                shutil.rmtree(scratch, ignore_errors=True)


_warned_about: set[Path] = set()


def _usable_root() -> Path:
    """The cache folder, or a temporary one, with one warning, if that cannot hold libraries."""
    root = cache_dir()
    if _writable(root):
        return root
    fallback = _temporary_cache_dir()
    if root not in _warned_about:
        _warned_about.add(root)
        logger.warning(
            "cannot write to the cache folder %s, or not run code from it; the compiled C++ "
            "kernels go to %s instead (set VAE_FAST_CACHE to a folder where that is possible)",
            root,
            fallback,
        )
    return fallback


def find() -> BuildInfo | None:
    """The library that :func:`load` would try first without building one; changes nothing."""
    try:
        return next(_found(), None)
    except BuildError:  # can_build() says why
        return None


def _found() -> Iterator[BuildInfo]:
    """The libraries that serve here, best first."""
    if info := _read(PACKAGE_DIR / PREBUILT_DIR, "prebuilt", source_key()):
        yield info
    root, native = cache_dir(), native_kernels()
    yield from _cached(root, native)
    try:
        find_compiler()
    except BuildError:  # another machine's, if it does for this one
        yield from _cached(root, KERNELS)
        for level in X86_64_LEVELS if native is not KERNELS else ():
            if level < x86_64_level():
                yield from _cached(root, _for_level(level))


def _load_library(info: BuildInfo) -> None:
    import torch

    try:
        torch.ops.load_library(str(info.path))
    except OSError as error:  # torch's, which leaves out what the loader said
        raise OSError(str(error.__cause__ or error)) from error


def build_eager() -> Path | None:
    """Finds or builds the shortcut for eager calls (``eager.cpp``); None where it cannot be had.

    Everything works without it, small batches more slowly; :func:`why_no_eager` tells why it is
    not there.
    """
    global _why_no_eager
    try:
        target = eager_target()
        key = source_key(target)
        if info := next(_cached(cache_dir(), target), None):
            return info.path
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            raise BuildError("Python's headers are not installed")
        return _build_cached(_usable_root(), key, target).path
    except (BuildError, OSError) as error:
        _why_no_eager = str(error)
        logger.info("no shortcut for eager calls: %s", error)
        return None


_why_no_eager: str | None = None


def why_no_eager() -> str | None:
    """What :func:`build_eager` or :func:`load_eager` had against the shortcut, if anything."""
    return _why_no_eager


def load_eager(
    path: Path, empty_like: Callable, smallest: int, autograd: dict[str, Callable]
) -> ModuleType | None:
    """The library that :func:`build_eager` found as a module.

    ``empty_like`` makes the gradients of ``smallest`` bytes or more (:mod:`vae_fast.buffers`);
    ``autograd`` are the ops' own Autograd kernels (:mod:`vae_fast.ops`).
    """
    global _why_no_eager
    name = "vae_fast._eager"
    try:
        loader = importlib.machinery.ExtensionFileLoader(name, str(path))
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
        loader.exec_module(module)
        module.connect(empty_like, smallest, autograd)
    except (ImportError, OSError, RuntimeError) as error:
        _why_no_eager = f"cannot load {path}: {error}"
        logger.warning("cannot load %s (%s); eager calls stay in Python", path, error)
        return None
    return module


def passes_address() -> int:
    """Where the loaded library keeps its passes (``passes.h``); 0 if it is not loaded."""
    import ctypes

    if _loaded is None:
        return 0
    passes = ctypes.CDLL(str(_loaded.path)).vae_fast_passes
    passes.restype = ctypes.c_void_p
    return passes()


_loaded: BuildInfo | None = None
_load_lock = threading.Lock()


def load() -> BuildInfo:
    """Finds or builds the library, loads it into torch (once per process) and says which one it is.

    Raises BuildError if there is none and none can be built; then nothing was registered with
    torch, and the next call tries again.
    """
    global _loaded
    with _load_lock:
        if _loaded is not None:
            return _loaded
        target = native_kernels()
        key = source_key(target)
        for info in _found():
            try:
                _load_library(info)
            except OSError as error:  # made for another machine, or cut short
                logger.warning("cannot load %s (%s)", info.path, error)
                with contextlib.suppress(BuildError):  # without a compiler, there is no other
                    if info.path.parent == _entry(cache_dir(), info.key):
                        shutil.rmtree(info.path.parent, ignore_errors=True)
            else:
                logger.debug("loaded %s (%s)", info.path, info.origin)
                _loaded = info
                return info
        info = _build_cached(_usable_root(), key, target)
        try:
            _load_library(info)
        except OSError as error:
            shutil.rmtree(info.path.parent, ignore_errors=True)
            raise BuildError(
                f"the C++ kernels were compiled but cannot be loaded: {error}"
            ) from error
        _loaded = info
        return info
