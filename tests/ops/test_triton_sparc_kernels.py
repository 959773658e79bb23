"""sparc_loss's Triton kernels: what they compute, in a process of its own, and compile to."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
from test_triton_kernels import ARCHITECTURES, NAMES, REGISTERS, SHARED, _assert_fits
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from medfast.ops.sparc import triton as sparc

KERNELS = [sparc._sparc_loss_forward_kernel, sparc._sparc_loss_gradient_kernel]
# Programs that are to fit on a multiprocessor.
PROGRAMS = 3
FEATURES = {"patches_ptr", "tokens_ptr", "shares_ptr", "pulls_ptr", "d_similarity_ptr"}
OTHERS = dict.fromkeys(("places_ptr", "lowest_ptr", "length_ptr"), "i32") | dict.fromkeys(
    ("token_mask_ptr", "patch_mask_ptr"), "u8"
)
# Kernels are bound to the interpreter, or to a GPU, when they are imported: a process of its own.
_NUMERICS = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-W", "ignore::RuntimeWarning"]
_NUMERICS += ["-p", "no:cacheprovider", str(Path(__file__).with_name("triton_sparc_numerics.py"))]


@pytest.fixture(scope="module", autouse=True)
def interpreter_run():
    """The numerical tests under the interpreter, which run beside this module's other tests."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as output:
        run = subprocess.Popen(_NUMERICS, env=environment, stdout=output, stderr=output, text=True)
        run.stdout = output
        yield run
        run.kill()
        run.wait()


def _compile(kernel, dtype, precision, architecture, has_mask=True, has_threshold=False):
    """Compile a kernel as a launch would, for pointers and widths that are multiples of 16."""
    given = sparc.constants(sparc.blocks_of(precision), precision)
    options = {name: given.pop(name) for name in ("num_warps", "num_stages", "maxnreg")}
    given |= {"HAS_MASK": has_mask, "HAS_THRESHOLD": has_threshold}
    kinds = OTHERS | dict.fromkeys(FEATURES, NAMES[dtype]) | {"threshold": "fp32"}
    if dtype == torch.bfloat16:
        kinds |= dict.fromkeys(("d_patches_ptr", "d_tokens_ptr"), "bf16")
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        is_pointer = name.endswith("_ptr")
        if name in given:
            signature[name], constants[(i,)] = "constexpr", given[name]
        elif is_pointer:
            signature[name] = "*" + kinds.get(name, "fp32")
        else:
            signature[name] = kinds.get(name, "i32")
        if is_pointer or name in ("D", "stride"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_kernels_use_tensor_cores_and_leave_room_for_three(kernel, dtype, architecture, tmp_path):
    compiled = _compile(kernel, dtype, "half", architecture)
    registers = _assert_fits(compiled, architecture, tmp_path)
    # 32 words are too few rows for the large instructions of 90 and 100, but patches are not.
    assert "mma.sync" in compiled.asm["ptx"]
    assert "cp.async" in compiled.asm["ptx"]
    threads = 32 * compiled.metadata.num_warps
    assert PROGRAMS * registers * threads <= REGISTERS
    assert PROGRAMS * (compiled.metadata.shared + 1024) <= SHARED[architecture][1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_fp32_uses_tf32_only_where_asked(kernel, precision, architecture, tmp_path):
    compiled = _compile(kernel, torch.float32, precision, architecture)
    _assert_fits(compiled, architecture, tmp_path)
    assert ("tf32" in compiled.asm["ptx"]) == (precision == "tf32")


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_kernels_fit_without_a_mask_and_with_a_threshold(kernel, tmp_path):
    compiled = _compile(kernel, torch.bfloat16, "half", 90, has_mask=False, has_threshold=True)
    _assert_fits(compiled, 90, tmp_path)


def test_values_under_the_interpreter(interpreter_run):
    versions = [tuple(map(int, x.__version__.split(".")[:2])) for x in (triton, np)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 needs NumPy below 2.4")
    interpreter_run.wait()
    interpreter_run.stdout.seek(0)
    assert interpreter_run.returncode == 0, interpreter_run.stdout.read()[-8000:]


@pytest.mark.gpu
def test_values_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    # What torch asks for where its library products are to be deterministic.
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    run = subprocess.run(_NUMERICS, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
