"""Builds medfast._C where there is a C++ compiler and medfast._CUDA where there is nvcc.

Everything else is in pyproject.toml. `MEDFAST_CUDA=1` makes a missing nvcc an error, 0 leaves CUDA
out; `MEDFAST_CUDA_ARCH` lists the architectures; `MAX_JOBS` limits the compilers at a time.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import pybind11
from pybind11.setup_helpers import Pybind11Extension
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, PlatformError

# Apple's compiler has no OpenMP of its own: its build runs on one thread.
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]

ARCHITECTURES = "80;90a;100"
# The first that compiles for sm_100.
OLDEST_NVCC = (12, 8)


class BuildKernels(build_ext):
    """Leaves kernels out, with a sentence, where they do not compile."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # The two modules side by side: each has sources that take their time.
        self.parallel = self.parallel or _jobs()

    def build_extension(self, ext: Extension) -> None:
        try:
            if ext.name == "medfast._CUDA":
                self._build_cuda(ext)
            else:
                super().build_extension(ext)
        except (CompileError, LinkError, PlatformError) as error:
            if not ext.optional:
                raise
            kind, impl, remedy = (
                ("CUDA", "cuda", f"Install CUDA {_dotted(OLDEST_NVCC)} or newer")
                if ext.name == "medfast._CUDA"
                else ("C++", "cpu", "Install a C++17 compiler, such as g++,")
            )
            self.warn(
                f"medfast is installed without its {kind} kernels (impl='{impl}' will be refused; "
                f"everything else works), because they did not compile: {error}. "
                f"{remedy} and run pip install again."
            )

    def _build_cuda(self, ext: Extension) -> None:
        """Compile each source with nvcc, some at a time, and link them with CUDA's runtime."""
        if os.environ.get("MEDFAST_CUDA") == "0":
            return
        target = Path(self.get_ext_fullpath(ext.name))
        objects = Path(self.build_temp, "cuda")
        targets = _targets(os.environ.get("MEDFAST_CUDA_ARCH", ARCHITECTURES))
        nvcc = _nvcc()
        # ccache knows nvcc; sources, objects and options are the same from build to build.
        cached = [*filter(None, [shutil.which("ccache")]), *nvcc]
        includes = [*self.include_dirs, sysconfig.get_path("include"), pybind11.get_include()]
        options = [
            *("-std=c++17", "-O3", "-Icsrc", *(f"-I{path}" for path in dict.fromkeys(includes))),
            *("-Xcompiler", "-fPIC,-fvisibility=hidden"),
            *(["-DMEDFAST_SM90A"] if any("sm_90a" in target for target in targets) else []),
        ]

        def compiled(source: str) -> str:
            result = objects / f"{Path(source).name}.o"
            if self.force or _is_older(result, [source, *ext.depends]):
                for_gpu = targets if source.endswith(".cu") else []
                _run([*cached, *options, *for_gpu, "-c", source, "-o", str(result)])
            return str(result)

        objects.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Objects of other architectures are not those asked for.
        stamp = objects / "options"
        if not stamp.exists() or stamp.read_text() != repr(targets):
            for old in objects.glob("*.o"):
                old.unlink()
            stamp.write_text(repr(targets))
        with ThreadPoolExecutor(_jobs()) as pool:
            found = list(pool.map(compiled, ext.sources))
        _run([*nvcc, "-shared", "-cudart", "static", "-o", str(target), *found])


def _nvcc() -> list[str]:
    """Return how nvcc is called, of a version that will do."""
    if not sys.platform.startswith("linux"):
        raise PlatformError("CUDA kernels are built on Linux alone")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, places)), None)
    if nvcc is None:
        raise PlatformError(f"there is no nvcc ({' or '.join(places)})")
    printed = _run([nvcc, "--version"])
    release = re.search(r"release (\d+)\.(\d+)", printed)
    if release is None:
        raise PlatformError(f"{nvcc} --version names no release")
    version = (int(release[1]), int(release[2]))
    if version < OLDEST_NVCC:
        raise PlatformError(
            f"{nvcc} is of CUDA {_dotted(version)}, older than {_dotted(OLDEST_NVCC)}"
        )
    # The compiler that the user names for C++ is the one for the host's part here.
    host = shlex.split(os.environ.get("CXX", ""))
    return [nvcc, *(["-ccbin", host[-1]] if host else [])]


def _targets(architectures: str) -> list[str]:
    """Return nvcc's options for a list such as "80;90a;100".

    The newest architecture that is no special one also goes in as PTX, which newer GPUs compile.
    """
    names = [name.strip() for name in architectures.split(";") if name.strip()]
    if not names or not all(re.fullmatch(r"[89]\d[a]?|1\d\d[af]?", name) for name in names):
        raise PlatformError(
            f"MEDFAST_CUDA_ARCH must list architectures from 80 on, as {ARCHITECTURES!r}; "
            f"got {architectures!r}"
        )
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    general = max((int(name) for name in names if name.isdigit()), default=None)
    if general is not None:
        targets.append(f"-gencode=arch=compute_{general},code=compute_{general}")
    return targets


def _run(command: list[str]) -> str:
    """Run a command and return what it prints; its last lines are the reason where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise PlatformError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise CompileError(f"{shlex.join(command)} failed:\n" + "\n".join(said[-20:]))
    return done.stdout


def _is_older(result: Path, sources: list[str]) -> bool:
    if not result.exists():
        return True
    made = result.stat().st_mtime
    return any(Path(source).stat().st_mtime > made for source in sources)


def _jobs() -> int:
    """Return how many compilers may run at a time."""
    return int(os.environ.get("MAX_JOBS", "0")) or os.cpu_count() or 1


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


setup(
    ext_modules=[
        Pybind11Extension(
            "medfast._C",
            sources=["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
            depends=sorted(glob("csrc/cpu/*.h") + glob("csrc/arithmetic/*.h")),
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=["-O3", "-fno-trapping-math", *OPENMP],
            extra_link_args=OPENMP,
            optional=True,
        ),
        Extension(
            "medfast._CUDA",
            sources=["csrc/cuda/bindings.cpp", *sorted(glob("csrc/cuda/*.cu"))],
            depends=["setup.py", *sorted(glob("csrc/cuda/*.h") + glob("csrc/arithmetic/*.h"))],
            optional=os.environ.get("MEDFAST_CUDA") != "1",
        ),
    ],
    cmdclass={"build_ext": BuildKernels},
)
