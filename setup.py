"""Builds medfast._C when there is a C++ compiler; everything else is in pyproject.toml."""

from __future__ import annotations

import sys
from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, PlatformError

# Apple's compiler has no OpenMP of its own: its build runs on one thread.
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]


class BuildKernels(build_ext):
    """Leaves the kernels out, with a sentence, where they do not compile."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        try:
            super().build_extension(ext)
        except (CompileError, LinkError, PlatformError) as error:
            self.warn(
                "medfast is installed without its C++ kernels (impl='cpu' will be refused; "
                f"everything else works), because they did not compile: {error}. "
                "Install a C++17 compiler, such as g++, and run pip install again."
            )


setup(
    ext_modules=[
        Pybind11Extension(
            "medfast._C",
            sources=["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
            depends=sorted(glob("csrc/cpu/*.h")),
            cxx_std=17,
            extra_compile_args=["-O3", "-fno-trapping-math", *OPENMP],
            extra_link_args=OPENMP,
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
