"""What the tests of the Triton kernels share: compiling without a GPU, and numerics beside it.

A module that imports it is skipped where there is no Triton to compile with.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted, not compiled, here", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def _version(module):
    return tuple(map(int, module.__version__.split(".")[:2]))


ARCHITECTURES = [80, 90, 100]
# The dtypes of features and how each may be multiplied.
each_precision = pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.bfloat16, "half"),
        (torch.float16, "half"),
        (torch.float32, "tf32"),
        (torch.float32, "ieee"),
    ],
    ids=str,
)
# What a program may have of shared memory, and a multiprocessor has, in bytes; each program takes
# 1 KiB more.
SHARED = {80: (163 * 1024, 164 * 1024), 90: (227 * 1024, 228 * 1024), 100: (227 * 1024, 228 * 1024)}
REGISTERS = 65536
# What a thread may spill, in bytes. The compilers of older releases keep more of what does not
# change from tile to tile in registers.
SPILLED = 0 if _version(triton) >= (3, 8) else 128
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def compile_kernel(kernel, architecture, constants, options, kinds, aligned):
    """Compile a kernel as a launch would, for pointers that are multiples of 16.

    Args:
        kernel: The kernel.
        architecture: 80, 90 or 100.
        constants: Its compile-time arguments.
        options: As num_warps.
        kinds: The types of other arguments by name, else fp32 for pointers and i32 for numbers.
        aligned: The numbers that are multiples of 16.
    """
    # A launch looks at the values of other arguments alone.
    given = {parameter.name for parameter in kernel.params if not parameter.do_not_specialize}
    assert given >= set(aligned) & set(kernel.arg_names)
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        is_pointer = name.endswith("_ptr")
        if name in constants:
            signature[name], constexprs[(i,)] = "constexpr", constants[name]
        elif is_pointer:
            signature[name] = "*" + kinds.get(name, "fp32")
        else:
            signature[name] = kinds.get(name, "i32")
        if name not in constants and (is_pointer or name in aligned):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def assert_fits(compiled, architecture, tmp_path):
    """Hold a kernel to the shared memory and the registers that there are; return its registers."""
    assert compiled.metadata.shared <= SHARED[architecture][0]
    registers, spilled = _usage(compiled, tmp_path)
    assert spilled <= SPILLED
    return registers


def _usage(compiled, tmp_path):
    """Return the registers of a thread and the bytes that it spills."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    command = [tool, "--dump-resource-usage", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))


class Numerics:
    """A file of numerical tests. It runs in a process of its own.

    Kernels are bound to the interpreter, or to a GPU, when they are imported.
    """

    def __init__(self, file):
        self._command = [sys.executable, "-m", "pytest", "-q", "--noconftest"]
        self._command += ["-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider"]
        self._command.append(str(Path(__file__).with_name(file)))

    @contextlib.contextmanager
    def interpreted(self):
        """Run them under the interpreter beside what happens within; yield the process."""
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        with tempfile.TemporaryFile("w+") as output:
            run = subprocess.Popen(
                self._command, env=environment, stdout=output, stderr=output, text=True
            )
            run.stdout = output
            yield run
            run.kill()
            run.wait()

    @staticmethod
    def check(run):
        """Wait for the process and show what failed."""
        if _version(triton) < (3, 7) and _version(np) >= (2, 4):
            pytest.skip("the interpreter of Triton 3.6 needs NumPy below 2.4")
        run.wait()
        run.stdout.seek(0)
        assert run.returncode == 0, run.stdout.read()[-8000:]

    def check_on_a_gpu(self):
        """Run them on the GPU at hand."""
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        # What torch asks for where its library products are to be deterministic.
        environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        run = subprocess.run(self._command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
