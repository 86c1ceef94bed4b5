"""The build of the C++ kernels: keys, cache, concurrency, failures.

Almost every test works on a copy of ``_build.py`` in a package of its own whose only source is a
few lines of C++, so that a build takes a fraction of a second and the real kernels are left alone.
"""

import errno
import importlib.util
import itertools
import json
import logging
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from vae_fast import _build

SOURCE = '#include "value.h"\nextern "C" int vae_fast_value() { return VALUE; }\n'
HEADER = "#define VALUE 1\n"

needs_compiler = pytest.mark.skipif(
    _build.can_build() is not None, reason=f"cannot build here: {_build.can_build()}"
)
_names = (f"vae_fast_build_copy_{number}" for number in itertools.count())


class Project:
    """A checkout in miniature, in a folder whose name needs every kind of quoting."""

    def __init__(self, root: Path):
        self.package = root / "it's a $(project): 1" / "vae_fast"
        self.csrc = self.package.parent / "kernels" / "csrc"
        self.package.mkdir(parents=True)
        self.csrc.mkdir(parents=True)
        self.script = self.package / "_build.py"
        shutil.copy(_build.__file__, self.script)
        (self.csrc / "cpu.cpp").write_text(SOURCE)
        for name in set(_build.KERNELS.sources) - {"cpu.cpp"}:
            (self.csrc / name).write_text("")
        (self.csrc / "value.h").write_text(HEADER)

    def process(self):
        """The module as a new process would have it: nothing loaded, nothing remembered."""
        spec = importlib.util.spec_from_file_location(next(_names), self.script)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        finally:
            del sys.modules[spec.name]
        return module

    def prebuild(self) -> Path:
        """What setup.py does for an editable install."""
        folder = self.package / _build.PREBUILT_DIR
        folder.mkdir()
        self.process().compile_into(folder)
        return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("VAE_FAST_CACHE", str(tmp_path / "the cache"))
    return tmp_path / "the cache"


@pytest.fixture
def project(tmp_path, cache) -> Project:
    return Project(tmp_path)


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing here"))
    monkeypatch.delenv("CXX", raising=False)


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


# ------------------------------------------------------------------------------------------------
# Keys
# ------------------------------------------------------------------------------------------------


def test_key_follows_sources_headers_and_flags(project):
    keys = [project.process().source_key()]
    (project.csrc / "README.md").write_text("not a source")
    assert project.process().source_key() == keys[0]

    (project.csrc / "cpu.cpp").write_text(SOURCE + "// changed\n")
    keys.append(project.process().source_key())
    (project.csrc / "value.h").write_text("#define VALUE 2\n")
    keys.append(project.process().source_key())
    (project.csrc / "more.h").write_text("")
    keys.append(project.process().source_key())
    module = project.process()
    module.CXX_FLAGS = (*module.CXX_FLAGS, "-g")
    keys.append(module.source_key())
    assert len(set(keys)) == len(keys)


def test_key_is_the_same_wherever_the_sources_lie(project):
    installed = project.package.parent / "site-packages" / "vae_fast"
    shutil.copytree(project.csrc, installed / "_csrc")
    before = project.process().source_key()
    project.script = shutil.copy(project.script, installed)
    module = project.process()
    assert module.csrc_dir() == installed / "_csrc"
    assert module.source_key() == before


def test_missing_sources(project):
    shutil.rmtree(project.csrc)
    module = project.process()
    assert module.find() is None
    assert "cpu.cpp" in module.can_build()
    with pytest.raises(module.BuildError, match=r"no cpu\.cpp in"):
        module.load()


# ------------------------------------------------------------------------------------------------
# Building, keeping, finding
# ------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("with_ninja", [True, False])
def test_built_once_then_cached(project, cache, with_ninja):
    module = project.process()
    if not with_ninja:
        module._find_ninja = lambda: None
    assert module.find() is None
    assert not cache.exists(), "find() must not write"

    built = module.load()
    assert built.origin == "built now"
    assert built.path.parent.parent == cache
    assert built.key == module.source_key(module.native_kernels())
    assert built.seconds > 0
    assert set(module.CXX_FLAGS) <= set(built.flags)
    assert module.load() is built
    assert entries(cache) == [built.path.parent.name]

    again = project.process()
    assert again.find().path == built.path
    cached = again.load()
    assert (cached.origin, cached.path, cached.key) == ("cached", built.path, built.key)
    assert (cached.compiler, cached.flags, cached.seconds) == (
        built.compiler,
        built.flags,
        built.seconds,
    )


@needs_compiler
def test_edited_header_is_built_anew(project, cache):
    first = project.process().load()
    (project.csrc / "value.h").write_text("#define VALUE 2\n")
    assert project.process().find() is None
    second = project.process().load()
    assert second.origin == "built now"
    assert second.path != first.path
    assert len(entries(cache)) == 2


@needs_compiler
def test_prebuilt_is_used_without_a_compiler(project, cache, request):
    folder = project.prebuild()
    request.getfixturevalue("no_compiler")
    info = project.process().load()
    assert info.origin == "prebuilt"
    assert info.path == folder / _build.LIB_NAME
    assert not cache.exists()


@needs_compiler
def test_stale_prebuilt_is_ignored(project, cache):
    folder = project.prebuild()
    (project.csrc / "cpu.cpp").write_text(SOURCE + "// changed\n")
    info = project.process().load()
    assert info.origin == "built now"
    assert folder not in info.path.parents


@needs_compiler
@pytest.mark.parametrize("record", ["", "{}", "[]", "null", '{"key": 1, "flags": 2}', None])
def test_prebuilt_without_a_good_record_is_ignored(project, record):
    path = project.prebuild() / _build.INFO_NAME
    path.unlink() if record is None else path.write_text(record)
    assert project.process().find() is None


@needs_compiler
def test_unloadable_library_is_built_anew(project, cache, caplog):
    first = project.process()
    first._load_library = lambda info: None  # a loaded library would be found in this process
    built = first.load()
    built.path.write_bytes(b"x" * built.path.stat().st_size)
    with caplog.at_level(logging.WARNING, logger="vae_fast.build"):
        info = project.process().load()
    assert info.origin == "built now"
    assert info.path == built.path
    assert "cannot load" in caplog.text


@needs_compiler
@pytest.mark.parametrize("kept", [0, 1, 64, 4096, -1])
def test_a_library_that_was_cut_short_is_never_loaded(kept, project, cache):
    """Its header may be whole: then the loader would meet the missing part as a bus error."""
    first = project.process()
    first._load_library = lambda info: None
    built = first.load()
    whole = built.path.read_bytes()
    built.path.write_bytes(whole[:kept])
    assert project.process().find() is None
    module = project.process()
    loaded = []
    module._load_library = lambda info: loaded.append(info.path.read_bytes())
    assert module.load().origin == "built now"
    assert [len(data) for data in loaded] == [len(whole)]


@needs_compiler
def test_what_was_built_and_cannot_be_loaded_is_not_kept(project, cache, tmp_path, monkeypatch):
    compiler, _ = _build.find_compiler()
    writes_rubbish = tmp_path / "rubbish-c++"
    writes_rubbish.write_text(
        f'#!/bin/sh\ncase " $* " in *" -shared "*) echo rubbish > "{_build.LIB_NAME}";;\n'
        f' *) exec {" ".join(compiler)} "$@";; esac\n'
    )
    writes_rubbish.chmod(0o755)
    monkeypatch.setenv("CXX", str(writes_rubbish))
    module = project.process()
    with pytest.raises(module.BuildError, match="were compiled but cannot be loaded"):
        module.load()
    assert entries(cache) == []


@needs_compiler
def test_a_compiler_that_writes_nothing(project, cache, tmp_path, monkeypatch):
    idle = tmp_path / "idle-c++"
    idle.write_text("#!/bin/sh\necho idle 1.0\n")
    idle.chmod(0o755)
    monkeypatch.setenv("CXX", str(idle))
    module = project.process()
    with pytest.raises(module.BuildError, match="cannot write the compiled"):
        module.load()
    assert entries(cache) == []


@needs_compiler
@pytest.mark.parametrize("full", ["copy2", "write_text", "mkdir"])
def test_full_disk(full, project, cache, monkeypatch):
    """Nothing half-written stays; the next process, with room again, builds."""
    module = project.process()
    module._find_ninja = lambda: None

    def no_room(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(shutil if full == "copy2" else Path, full, no_room)
        with pytest.raises(module.BuildError, match="No space left"):
            module.load()
    assert entries(cache) == []
    assert project.process().load().origin == "built now"


@needs_compiler
def test_flags_from_the_environment(project, cache, monkeypatch):
    """Part of the key, and of every command."""
    (project.csrc / "cpu.cpp").write_text(SOURCE.replace("VALUE;", "VALUE + EXTRA;"))
    plain = project.process()
    with pytest.raises(plain.BuildError, match="EXTRA"):
        plain.load()
    monkeypatch.setenv("VAE_FAST_CXXFLAGS", "-DEXTRA='(1 + 1)' -g")
    module = project.process()
    info = module.load()
    own = module._compile_flags(module.native_kernels())
    assert info.flags[: len(own)] == own
    assert own[-2:] == ("-DEXTRA=(1 + 1)", "-g")
    commands = module._commands(("c++",), module.KERNELS)
    assert all("-g" in command for _, _, command in commands)
    monkeypatch.delenv("VAE_FAST_CXXFLAGS")
    assert project.process().find() is None


def test_flags_that_cannot_be_read(project, cache, monkeypatch):
    monkeypatch.setenv("VAE_FAST_CXXFLAGS", "-D'")
    module = project.process()
    assert module.find() is None
    assert "VAE_FAST_CXXFLAGS" in module.can_build()
    with pytest.raises(module.BuildError, match="VAE_FAST_CXXFLAGS"):
        module.load()


@needs_compiler
def test_cached_library_is_used_without_a_compiler(project, request):
    built = project.process().load()
    request.getfixturevalue("no_compiler")
    info = project.process().load()
    assert (info.origin, info.path) == ("cached", built.path)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("VAE_FAST_CACHE", "~/somewhere")
    assert _build.cache_dir() == Path.home() / "somewhere"
    monkeypatch.delenv("VAE_FAST_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _build.cache_dir() == tmp_path / "vae_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _build.cache_dir() == Path.home() / ".cache" / "vae_fast"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert _build.cache_dir() == Path.home() / "Library" / "Caches" / "vae_fast"


@pytest.mark.parametrize("wanted", ["", "~/cache", "~nobody-of-that-name/cache"])
def test_cache_folder_of_a_user_without_a_home(wanted, tmp_path, monkeypatch):
    monkeypatch.setenv("VAE_FAST_CACHE", wanted)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it is for one who has none
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert _build.cache_dir().parent == tmp_path


def test_key_of_the_eager_shortcut_follows_torch_and_python(monkeypatch):
    import torch

    keys = [_build.source_key(_build.eager_target())]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99.0")
        keys.append(_build.source_key(_build.eager_target()))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version", "3.99.0")
        keys.append(_build.source_key(_build.eager_target()))
    kernels = _build.source_key()
    assert len({*keys, kernels}) == 4


# ------------------------------------------------------------------------------------------------
# Instruction sets
# ------------------------------------------------------------------------------------------------

X86_64_LINUX = sys.platform == "linux" and os.uname().machine == "x86_64"


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        (["avx512f avx512bw avx512cd avx512dq avx512vl avx2 fma bmi2 f16c"] * 2, 4),
        (["avx512f avx512bw avx512cd avx512dq avx512vl", "avx2 fma bmi2 f16c"], 1),  # not on both
        (["avx512f avx512cd avx2 fma bmi2 f16c"], 3),
        (["avx2 fma bmi2"], 1),
        ([], None),
    ],
)
def test_level_of_a_processor(flags, level, project, monkeypatch):
    text = "".join(f"processor: 0\nflags\t\t: sse2 {words}\nbugs: avx2\n\n" for words in flags)
    monkeypatch.setattr(Path, "read_text", lambda path: {"/proc/cpuinfo": text}[str(path)])
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for machine in ("x86_64", "aarch64"):
        monkeypatch.setattr(_build.platform, "machine", lambda: machine)  # noqa: B023
        assert project.process().x86_64_level() == (level if machine == "x86_64" else None)


@pytest.mark.parametrize(("asked", "level"), [("AVX512", 4), ("AVX2", 3), ("DEFAULT", 1)])
def test_level_is_no_higher_than_what_pytorch_finds(asked, level, project, monkeypatch):
    """Emulators may show the features of the machine that they run on."""
    text = "flags: " + " ".join(set().union(*_build.X86_64_LEVELS.values()))
    monkeypatch.setattr(Path, "read_text", lambda path: {"/proc/cpuinfo": text}[str(path)])
    monkeypatch.setattr(_build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: asked)
    assert project.process().x86_64_level() == level


def test_level_where_nothing_tells_it(project, monkeypatch):
    def absent(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", absent)
    module = project.process()
    assert module.x86_64_level() is None
    assert module.native_kernels() is module.KERNELS


def test_the_levels_are_those_that_the_kernels_know():
    chosen = (_build.csrc_dir() / "cpu.cpp").read_text()
    compiled = (_build.csrc_dir() / "each_isa.h").read_text()
    features = re.findall(r'__builtin_cpu_supports\("(\w+)"\)', chosen)
    levels = _build.X86_64_LEVELS
    assert sorted(features) == sorted(feature for level in levels.values() for feature in level)
    assert [int(n) for n in re.findall(r"if VAE_FAST_X86_64_LEVEL == (\d)", compiled)] == [*levels]


@needs_compiler
@pytest.mark.skipif(not X86_64_LINUX, reason="levels of x86-64")
def test_level_is_what_the_compiler_finds(tmp_path):
    conditions = (
        (level, " && ".join(["1", *(f'__builtin_cpu_supports("{name}")' for name in features)]))
        for level, features in _build.X86_64_LEVELS.items()
    )
    body = "".join(f"if ({condition}) return {level};" for level, condition in conditions)
    (tmp_path / "level.cpp").write_text(f"int main() {{ __builtin_cpu_init(); {body} }}\n")
    subprocess.run(
        [*_build.find_compiler()[0], "level.cpp", "-o", "level"], cwd=tmp_path, check=True
    )
    assert subprocess.run([tmp_path / "level"]).returncode == _build.x86_64_level()


@needs_compiler
@pytest.mark.skipif(not X86_64_LINUX, reason="levels of x86-64")
def test_machines_that_share_a_cache_do_not_mix_up_their_libraries(project, cache, monkeypatch):
    (project.csrc / "cpu.cpp").write_text(SOURCE.replace("VALUE;", "VAE_FAST_X86_64_LEVEL;"))
    better, lesser = project.process(), project.process()
    monkeypatch.setattr(better, "x86_64_level", lambda: 4)
    monkeypatch.setattr(lesser, "x86_64_level", lambda: 3)
    ours = better.load()
    assert "-DVAE_FAST_X86_64_LEVEL=4" in ours.flags
    assert lesser.find() is None
    theirs = lesser.load()
    assert (theirs.origin, theirs.path.parent.parent) == ("built now", cache)
    assert len(entries(cache)) == 2
    assert better.find().path == ours.path
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert (better.find().path, lesser.find().path) == (ours.path, theirs.path)
    shutil.rmtree(theirs.path.parent)
    assert lesser.find() is None, "what is above this machine must not be loaded"


@needs_compiler
@pytest.mark.skipif(not X86_64_LINUX, reason="levels of x86-64")
@pytest.mark.parametrize("made", [1, 3, None])
def test_without_a_compiler_what_is_for_lesser_machines_serves(made, project, monkeypatch):
    lesser, better = project.process(), project.process()
    monkeypatch.setattr(lesser, "x86_64_level", lambda: made)
    monkeypatch.setattr(better, "x86_64_level", lambda: 4)
    built = lesser.load()
    assert better.find() is None, "it can make a better one"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert better.find().path == built.path
    assert better.load().origin == "cached"


@needs_compiler
def test_without_a_compiler_every_library_is_tried_and_none_deleted(project, cache, monkeypatch):
    """They are other machines' as well."""
    built = project.process().load()
    bad = built.path.parent.with_name(built.path.parent.name[:-8] + "00000000")
    shutil.copytree(built.path.parent, bad)
    (bad / built.path.name).write_bytes(b"x" * built.path.stat().st_size)
    monkeypatch.setenv("CXX", "no-such-compiler")
    module = project.process()
    info = module.load()
    assert (info.origin, info.path) == ("cached", built.path)
    assert bad.exists()


@needs_compiler
def test_options_of_the_compiler_make_another_library(project, cache, monkeypatch):
    command = " ".join(_build.find_compiler()[0])
    for number, options in enumerate(("", " -O0", " -g", " -O0"), 1):
        monkeypatch.setenv("CXX", command + options)
        assert project.process().load().origin == ("cached" if number == 4 else "built now")
        assert len(entries(cache)) == min(number, 3)


@needs_compiler
def test_what_a_compiler_rejected_is_not_tried_again(project, cache, monkeypatch):
    (project.csrc / "cpu.cpp").write_text("#error wrong\n")
    first = project.process()
    with pytest.raises(first.BuildError, match="error wrong"):
        first.load()
    again = project.process()
    again.compile_into = lambda *_: pytest.fail("compiled again")
    with pytest.raises(
        again.BuildError, match=r"could not be compiled before: .* says why"
    ) as told:
        again.load()
    (kept,) = (cache / name for name in entries(cache))
    assert str(kept) in str(told.value)
    os.utime(kept, (time.time() - 3700.0,) * 2)  # what was missing may have been installed
    with pytest.raises(pytest.fail.Exception, match="compiled again"):
        again.load()
    os.utime(kept)
    with pytest.raises(again.BuildError, match="could not be compiled before"):
        again.load()
    kept.unlink()
    with pytest.raises(pytest.fail.Exception, match="compiled again"):
        again.load()


@needs_compiler
def test_leftovers_of_killed_builds_are_deleted_the_next_day(project, cache):
    cache.mkdir()
    old, new = cache / ".building-1-old", cache / ".building-1-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "some.o").touch()
    os.utime(old, (time.time() - 1e5,) * 2)
    project.process().load()
    assert not old.exists()
    assert new.exists()


@needs_compiler
def test_compilers_speak_english(project, cache, tmp_path, monkeypatch):
    """By their words it is known who is to blame for a failure."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\n[ "$LC_ALL" = C ] && echo "a.cpp:1: error: no" && exit 1\necho 1.0\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    module = project.process()
    with pytest.raises(module._Rejected, match="error: no"):
        module.load()


@needs_compiler
def test_prebuilt_kernels_are_for_every_machine(project, monkeypatch):
    folder = project.prebuild()
    assert "LEVEL" not in (folder / _build.INFO_NAME).read_text()
    for level in (1, 4, None):
        module = project.process()
        monkeypatch.setattr(module, "x86_64_level", lambda: level)  # noqa: B023
        assert module.find().origin == "prebuilt"


# ------------------------------------------------------------------------------------------------
# Several processes
# ------------------------------------------------------------------------------------------------


@needs_compiler
def test_processes_that_start_together_build_once(project, cache, tmp_path):
    compiler, _ = _build.find_compiler()
    log = tmp_path / "compilations"
    slow = tmp_path / "slow-c++"
    slow.write_text(
        "#!/bin/sh\n"
        f'case " $* " in *" -c "*) echo one >> "{log}"; sleep 0.5;; esac\n'
        f'exec {" ".join(compiler)} "$@"\n'
    )
    slow.chmod(0o755)
    # Builds but does not load: importing torch would take longer than the build.
    script = (
        "import importlib.util, json, sys\n"
        "spec = importlib.util.spec_from_file_location('build', sys.argv[1])\n"
        "build = importlib.util.module_from_spec(spec)\n"
        "sys.modules['build'] = build\n"
        "spec.loader.exec_module(build)\n"
        "build._load_library = lambda info: open(info.path, 'rb').close()\n"
        "info = build.load()\n"
        "print(json.dumps([str(info.path), info.origin]))\n"
    )

    def run(_):
        return subprocess.run(
            [sys.executable, "-c", script, str(project.script)],
            env=os.environ | {"CXX": str(slow)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    with ThreadPoolExecutor(3) as pool:
        results = [json.loads(output) for output in pool.map(run, range(3))]
    assert len({path for path, _ in results}) == 1
    assert sorted(origin for _, origin in results) == ["built now", "cached", "cached"]
    assert log.read_text().split() == ["one"] * len(_build.KERNELS.sources)
    assert entries(cache) == [Path(results[0][0]).parent.name]


@needs_compiler
@pytest.mark.parametrize("passing", [False, True])
def test_who_waited_for_a_build_that_failed_does_not_repeat_it(project, cache, passing):
    """Unless what stopped it may be over."""
    words = '"No space left on device"' if passing else '"a mistake of ours"'
    (project.csrc / "cpu.cpp").write_text(f"#error {words}\n")
    first, second = project.process(), project.process()
    second.compile_into = lambda *_: pytest.fail("compiled again")
    run, lock, waits = first._run, second._lock, threading.Event()

    def lock_and_tell(path):
        waits.set()
        return lock(path)

    def run_once_the_other_waits(*arguments):
        waits.wait(100)
        run(*arguments)

    first._run, second._lock = run_once_the_other_waits, lock_and_tell
    expected = pytest.fail.Exception if passing else second.BuildError

    def wait():
        with pytest.raises(expected, match="compiled again" if passing else "a mistake of ours"):
            second.load()

    with ThreadPoolExecutor(2) as pool:
        failing = pool.submit(first.load)
        while not list(cache.glob(".building-*")):
            time.sleep(0.01)
        waiting = pool.submit(wait)
        with pytest.raises(first.BuildError):
            failing.result()
        waiting.result()


@needs_compiler
def test_the_first_of_two_unlocked_builds_stays(project, cache):
    ours, theirs = project.process(), project.process()
    compile_into = ours.compile_into

    def compile_slowly(folder, target):
        info = compile_into(folder, target)
        theirs.load()  # meanwhile, on a file system without locks
        return info

    ours.compile_into = compile_slowly
    theirs.LOCK_TIMEOUT_S = 0
    info = ours.load()
    assert (info.origin, info.path) == ("cached", theirs.load().path)
    assert len(entries(cache)) == 1


# ------------------------------------------------------------------------------------------------
# What can go wrong
# ------------------------------------------------------------------------------------------------


@needs_compiler
def test_unwritable_cache_falls_back_to_a_temporary_folder(project, tmp_path, monkeypatch, caplog):
    # A folder below a file cannot be made, not even by root, whom file modes do not stop.
    (tmp_path / "file").touch()
    monkeypatch.setenv("VAE_FAST_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    with caplog.at_level(logging.WARNING, logger="vae_fast.build"):
        module = project.process()
        info = module.load()
        module._usable_root()
    assert info.origin == "built now"
    assert tmp_path / "tmp" in info.path.parents
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 2
    assert "VAE_FAST_CACHE" in caplog.messages[0]
    assert "a minute or so, once" in caplog.messages[1]  # nobody takes it for a program that hangs
    caplog.clear()
    assert project.process().load().origin == "cached"


@needs_compiler
def test_unwritable_cache_that_has_the_library(project):
    built = project.process().load()
    module = project.process()
    module._writable = lambda folder: False
    assert module.load().path == built.path


@needs_compiler
def test_cache_that_code_cannot_be_run_from(project, cache, tmp_path, monkeypatch, caplog):
    """A folder on a file system that is mounted noexec."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    statvfs = os.statvfs

    def mounted(path):
        found = list(statvfs(path))
        found[8] |= os.ST_NOEXEC if Path(path).is_relative_to(cache) else 0
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", mounted)
    info = project.process().load()
    assert tmp_path / "tmp" in info.path.parents
    assert "not run code from it" in caplog.text
    assert project.process().load().origin == "cached"


def test_interrupted_build_stops_its_compilers(project, tmp_path, monkeypatch):
    """The command is asked to end, and not killed, so that ninja can end what it began."""
    module = project.process()
    command = ["sh", "-c", "sleep 99 & trap 'kill $!; touch ended; exit 3' TERM; touch begun; wait"]
    communicate = subprocess.Popen.communicate

    def interrupted(process, *arguments, **options):
        if interrupts.pop():
            while not (tmp_path / "begun").exists():
                time.sleep(0.01)
            raise KeyboardInterrupt
        return communicate(process, *arguments, **options)

    interrupts = [False, True]
    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module._run(command, tmp_path)
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize(
    ("output", "rejected"),
    [
        ("eager.cpp:3: error: no such type", True),
        ("ninja: build stopped: interrupted by user.", False),
        ("fatal error: error writing to cpu.s: No space left on device", False),
        ("c++: fatal error: Killed signal terminated program cc1plus", False),
    ],
)
def test_which_failures_would_come_again(output, rejected, tmp_path):
    with pytest.raises(_build.BuildError, match="exited with status 1") as caught:
        _build._run(["sh", "-c", f"echo {shlex.quote(output)}; exit 1"], tmp_path)
    assert isinstance(caught.value, _build._Rejected) == rejected


def test_compilers_that_cannot_be_read(project, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", 'c++ "')
    assert "cannot read CXX=" in project.process().can_build()
    compiler = tmp_path / "my c++"
    compiler.write_text("#!/bin/sh\necho mine")
    compiler.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "'./my c++' -m64")
    assert project.process().find_compiler() == ((str(compiler), "-m64"), "mine")


def test_temporary_folder_of_others_is_not_trusted(project, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    module = project.process()
    own = module._temporary_cache_dir()
    assert module._temporary_cache_dir() == own
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    own.chmod(0o777)
    private = module._temporary_cache_dir()
    assert private != own
    assert stat.S_IMODE(private.stat().st_mode) == 0o700


def test_no_compiler(project, cache, no_compiler, monkeypatch):
    module = project.process()
    assert "no C++ compiler" in module.can_build()
    with pytest.raises(module.BuildError, match=r"no C\+\+ compiler: none of c\+\+, g\+\+"):
        module.load()
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(module.BuildError, match="CXX='no-such-compiler -m64'"):
        module.load()


def test_compiler_that_cannot_run(project, tmp_path, monkeypatch):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho out of order >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    module = project.process()
    with pytest.raises(module.BuildError, match=r"exited with status 3: out of order"):
        module.load()


def test_no_torch(project, monkeypatch):
    module = project.process()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "torch is not importable" in module.can_build()


def test_excerpt_begins_with_the_first_error():
    words = [f"line {i}" for i in range(100)]
    assert _build._excerpt("\n".join(words), 3) == "...\nline 97\nline 98\nline 99"
    assert _build._excerpt("\n".join(words), 100) == "\n".join(words)
    words[10] = "a.cpp:1:1: error: wrong"
    assert _build._excerpt("\n".join(words), 2) == f"...\n{words[10]}\n{words[11]}\n..."
    assert _build._excerpt("", 3) == ""


@needs_compiler
def test_compile_error_shows_the_compilers_words_and_leaves_nothing(project, cache):
    (project.csrc / "cpu.cpp").write_text('#error "a mistake of ours"\n')
    module = project.process()
    with pytest.raises(module.BuildError, match="a mistake of ours"):
        module.load()
    (kept,) = entries(cache)
    assert kept.endswith(".failed")
    assert "a mistake of ours" in (cache / kept).read_text()
    (project.csrc / "cpu.cpp").write_text(SOURCE)
    assert module.load().origin == "built now"


# ------------------------------------------------------------------------------------------------
# The package in bad surroundings: it falls back, with one warning
# ------------------------------------------------------------------------------------------------

CALL = """
import json, logging, warnings
records = []
class Keep(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())
logging.getLogger("vae_fast").addHandler(Keep(logging.WARNING))
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import torch, vae_fast
    for _ in range(2):
        mu = torch.zeros(4, 3, requires_grad=True)
        z, log_q, log_p = vae_fast.reparameterize(mu, torch.zeros(4, 3))
        vae_fast.fused_elbo(z.detach(), mu * 1, torch.zeros(4, 3), log_q, log_p)[0].backward()
        assert mu.grad.isfinite().all()
ours = [str(w.message) for w in seen if "vae_fast" in str(w.message)]
print(json.dumps([vae_fast.backends.backend_for("cpu"), ours + records]))
"""


@pytest.fixture
def package(tmp_path):
    """Calls the real package, copied without compiled kernels, in a process of its own."""
    ignored = shutil.ignore_patterns("__pycache__", _build.PREBUILT_DIR)
    for folder in (_build.PACKAGE_DIR, _build.csrc_dir().parent):  # one, if it is installed
        shutil.copytree(folder, tmp_path / "copy" / folder.name, ignore=ignored, dirs_exist_ok=True)

    def call(**environment):
        left_out = ("CXX", "VAE_FAST_BACKEND", "VAE_FAST_CXXFLAGS", "TRITON_INTERPRET")
        inherited = {n: v for n, v in os.environ.items() if n not in left_out}
        done = subprocess.run(
            [sys.executable, "-c", CALL],
            cwd=tmp_path,
            env=inherited
            | {"VAE_FAST_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path / "copy")}
            | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return call


@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        (None, "no C++ compiler"),
        ("exit 3", "exited with status 3"),
        ('case "$*" in *--version*) echo fake 1.0;; *) echo "x.cpp:1: error: no"; exit 1;; esac',
         "error: no"),
        ('case "$*" in *--version*) echo fake 1.0;; *) kill -SEGV $$;; esac', "exited with status"),
        ("echo fake 1.0", "cannot write the compiled C++ kernels"),
    ],
    ids=["absent", "broken", "failing", "crashing", "idle"],
)  # fmt: skip
@pytest.mark.skipif(sys.platform == "win32", reason="the compilers here are shell scripts")
def test_fallback_to_the_reference_warns_once(compiler, says, package, tmp_path):
    if compiler is None:
        surroundings = {"PATH": str(tmp_path / "nothing here")}
    else:
        script = tmp_path / "c++"
        script.write_text(f"#!/bin/sh\n{compiler}\n")
        script.chmod(0o755)
        surroundings = {"CXX": str(script)}
    backend, warned = package(**surroundings)
    assert backend == "reference"
    announced = [text for text in warned if "a minute or so, once" in text]
    assert len(announced) == (says not in ("no C++ compiler", "exited with status 3"))
    warned = [text for text in warned if text not in announced]
    assert len(warned) == 1, warned
    assert says in warned[0]
    assert "runs on the slower reference backend" in warned[0]


@needs_compiler
def test_unwritable_cache_warns_once(package, tmp_path):
    """The kernels in use now, where the package will look once it cannot use its cache folder."""
    info = _build.load()
    if info.origin == "prebuilt":
        pytest.skip("the package has its kernels, and keeps none")
    user = tmp_path / "tmp" / f"vae_fast-{os.getuid()}"
    user.mkdir(parents=True, mode=0o700)
    shutil.copytree(info.path.parent, _build._entry(user, info.key))
    if eager := _build.build_eager():
        shutil.copytree(eager.parent, user / eager.parent.name)
    (tmp_path / "file").touch()
    backend, warned = package(VAE_FAST_CACHE=str(tmp_path / "file" / "x"), TMPDIR=str(user.parent))
    assert backend == "cpp"
    assert len(warned) == 1, warned
    assert "VAE_FAST_CACHE" in warned[0]


# ------------------------------------------------------------------------------------------------
# The real kernels
# ------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="reads the symbols of an ELF file")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_library_uses_only_torchs_stable_symbols():
    """One binary for every torch from 2.10 on: no C++ symbol of torch's may be needed."""
    path = _build.load().path
    output = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", path], capture_output=True, text=True, check=True
    ).stdout
    # In mangled names, a namespace is its length and its name.
    foreign = re.findall(r"\S*(?<!\d)(?:2at|3c10|5torch)\S*|\b_?Py\S+", output)
    assert not foreign
    assert "aoti_torch_" in output
