"""Compiles the CPU kernels into the package where that is possible; the rest is in pyproject.toml.

torch is not a build requirement: in pip's isolated build environment there is none, nothing is
compiled, and the kernels are built once, at first use. With ``--no-build-isolation``, and torch and
a C++ compiler at hand, they are compiled here. The same code does both: ``vae_fast/_build.py``.
"""

import importlib.util
import logging
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ModuleNotFoundError:  # pip checks it only where it isolates the build
    sys.exit('vae_fast: setuptools is too old: pip install --upgrade "setuptools>=77"')

ROOT = Path(__file__).resolve().parent


def load_build_module():
    """vae_fast/_build.py, by its path: importing the package would import torch."""
    spec = importlib.util.spec_from_file_location("vae_fast_build", ROOT / "vae_fast" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses looks its module up
    spec.loader.exec_module(module)
    return module


build = load_build_module()


class BuildKernels(build_ext):
    """Compiles the kernels with vae_fast/_build.py: they are no Python extension module."""

    def _folder(self):
        package = (
            ROOT / "vae_fast"
            if self.inplace or self.editable_mode
            else Path(self.build_lib) / "vae_fast"
        )
        return package / build.PREBUILT_DIR

    def run(self):
        target = self._folder()
        shutil.rmtree(target, ignore_errors=True)
        try:
            with tempfile.TemporaryDirectory() as name:
                info = build.compile_into(Path(name))
                target.mkdir(parents=True)
                for file in (build.LIB_NAME, build.INFO_NAME):
                    shutil.copy2(Path(name, file), target)
        except build.BuildError as error:
            self.warn(f"the C++ kernels were not compiled and will be built at first use: {error}")
        else:
            self.announce(
                f"compiled {target / build.LIB_NAME} in {info.seconds:.1f} s", level=logging.INFO
            )

    def get_outputs(self):
        return [str(path) for path in sorted(self._folder().glob("*"))]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return []


class PlatformWheel(bdist_wheel):
    """With compiled kernels a wheel is for one platform, yet for every Python: they use none."""

    def get_tag(self):
        _, _, platform = super().get_tag()
        return ("py3", "none", platform)


reason = build.can_build()
if reason is None:
    setup(
        ext_modules=[Extension("vae_fast._lib", sources=[])],
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
    )
else:
    print(f"vae_fast: the C++ kernels will be built at first use ({reason})", file=sys.stderr)
    setup()
