"""What gets installed: the wheel, its metadata, and what can be imported from it."""

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vae_fast import _build

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="needs a checkout of the project"
)


def pip(*arguments, **environment) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def python(code: str, cwd: Path, *path: Path, **environment) -> str:
    """What ``python -c code`` prints in ``cwd``, with ``path`` before site-packages."""
    places = os.pathsep.join(map(str, path))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": places} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.strip()


def checkout(folder: Path) -> Path:
    """A clean copy of what a wheel is made of: a build writes into the folder it runs in."""
    ignore = shutil.ignore_patterns("__pycache__", _build.PREBUILT_DIR, "*.egg-info")
    for name in ("vae_fast", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    return folder


def build_wheel(source: Path, out: Path, **environment) -> Path:
    # Nothing is fetched: setuptools is a requirement of torch, so it is in every environment.
    pip(
        "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, source, **environment
    )
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel as pip's isolated build makes it, with nothing compiled."""
    folder = tmp_path_factory.mktemp("wheel")
    return build_wheel(checkout(folder / "source"), folder / "out", CXX="no-such-compiler")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with nothing but that wheel's installation."""
    target = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--no-compile", "--target", target, wheel)
    return target


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_wheel_holds_every_source_and_nothing_else(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    expected = {"vae_fast/py.typed"}
    for folder, package in (
        ("vae_fast", "vae_fast"),
        ("kernels/triton", "vae_fast/_triton"),
        ("kernels/csrc", "vae_fast/_csrc"),
    ):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}:
                expected.add(f"{package}/{path.relative_to(ROOT / folder).as_posix()}")
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected


def test_metadata(metadata, installed):
    version = python("import vae_fast; print(vae_fast.__version__)", installed, installed)
    assert metadata["Name"] == "vae_fast"
    assert metadata["Version"] == version
    assert metadata["Requires-Python"] == ">=3.10"
    needed = {value for value in metadata.get_all("Requires-Dist") if "extra ==" not in value}
    assert needed == {"torch>=2.10", "numpy", "ninja"}
    (scripts,) = installed.glob("vae_fast-*.dist-info/entry_points.txt")
    assert "vae-fast = vae_fast.cli:main" in scripts.read_text()


def test_torch_is_no_build_requirement():
    """Else pip would fetch another torch to build with, gigabytes of it."""
    text = (ROOT / "pyproject.toml").read_text()
    (requires,) = re.findall(r"(?m)^requires = \[(.*)\]$", text)
    assert "torch" not in requires


def test_every_requirement_is_pinned(metadata):
    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    pinned = set()
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([\w.-]+)==[\w.]+(; .+)?", line)
            assert match, f"not an exact version: {line}"
            pinned.add(plain(match[1]))
    wanted = {plain(re.match(r"[\w.-]+", value)[0]) for value in metadata.get_all("Requires-Dist")}
    assert wanted - {"vae-fast"} <= pinned


def test_import_from_a_wheel(installed):
    """Everything comes from the wheel, and there is no need of a compiler or of Triton."""
    code = (
        "import importlib.util, sys\n"
        "sys.modules['triton'] = None\n"
        "import vae_fast, vae_fast._build, vae_fast.cli\n"
        "print(vae_fast.__file__)\n"
        "print(vae_fast.cli.__file__)\n"
        "print(vae_fast._build.csrc_dir() / 'cpu.cpp')\n"
        "print(importlib.util.find_spec('vae_fast._triton').origin)\n"
    )
    found = python(code, installed.parent, installed, PATH="", VAE_FAST_BACKEND="").splitlines()
    assert found == [
        str(installed / "vae_fast" / name)
        for name in ("__init__.py", "cli/__init__.py", "_csrc/cpu.cpp", "_triton/__init__.py")
    ]


def test_kernels_is_left_to_the_package_of_that_name(installed, tmp_path):
    """A package called ``kernels`` is found even from our root, which has a folder of that name."""
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").touch()
    for folder in (ROOT, tmp_path.parent):
        found = python("import kernels; print(kernels.__file__)", folder, tmp_path)
        assert Path(found) == other / "__init__.py"
    assert not (installed / "kernels").exists()


def test_a_checkout_that_is_not_installed_finds_the_triton_kernels():
    """As ``python -m vae_fast.cli`` in it does: its own package comes before the installed one."""
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "import vae_fast; launchers = vae_fast.backends._launchers()\n"
        "from vae_fast._triton import latent\n"
        "print(hasattr(launchers, 'latent_forward'), launchers.__file__)"
    )
    expected = f"True {ROOT / 'kernels' / 'triton' / '__init__.py'}"
    assert python(code, ROOT, ROOT).splitlines()[-1] == expected


def test_this_environment_finds_the_triton_kernels():
    """In an editable install, setuptools must map the package to kernels/triton."""
    code = "import importlib.util; print(importlib.util.find_spec('vae_fast._triton') is not None)"
    assert python(code, ROOT).splitlines()[-1] == "True"


@pytest.mark.skipif(_build.can_build() is not None, reason=f"{_build.can_build()}")
@pytest.mark.parametrize("works", [True, False], ids=["compiles", "does not compile"])
def test_wheel_built_where_torch_is(tmp_path, works):
    """Without build isolation the kernels are compiled; if that fails, the wheel has none."""
    source = checkout(tmp_path / "source")
    for file in (source / "kernels" / "csrc").glob("*.cpp"):
        file.write_text("")  # the kernels themselves take minutes
    code = 'extern "C" int vae_fast_value() { return 1; }\n' if works else "#error no\n"
    (source / "kernels" / "csrc" / "cpu.cpp").write_text(code)
    wheel = build_wheel(source, tmp_path / "out")
    assert re.search(r"-py3-none-(?!any)\w+\.whl$", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if name.startswith("vae_fast/_lib/")}
    names = (_build.LIB_NAME, _build.INFO_NAME)
    assert found == ({f"vae_fast/_lib/{name}" for name in names} if works else set())
    if works:
        pip("install", "--no-deps", "--no-index", "--no-compile", "--target", tmp_path / "s", wheel)
        code = "import vae_fast._build as b; i = b.find(); print(i.origin, i.path)"
        found = python(code, tmp_path, tmp_path / "s", PATH="")
        expected = tmp_path / "s" / "vae_fast" / "_lib" / _build.LIB_NAME
        assert found.splitlines()[-1] == f"prebuilt {expected}"
