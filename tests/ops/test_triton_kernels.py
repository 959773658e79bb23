"""The Triton kernels: what they compute, in a process of its own, and what they compile to."""

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

from medfast.ops import triton_tiles
from medfast.ops.clip import triton as clip
from medfast.ops.ranking import triton as ranking
from medfast.ops.siglip import triton as siglip

ARCHITECTURES = [80, 90, 100]
# What a program may have of shared memory, and a multiprocessor has, in bytes; each program takes
# 1 KiB more.
SHARED = {80: (163 * 1024, 164 * 1024), 90: (227 * 1024, 228 * 1024), 100: (227 * 1024, 228 * 1024)}
REGISTERS = 65536
# What ptxas may spill: a few registers, once in a tile, cost nothing that can be measured.
SPILLED = 16
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
FEATURES = {"rows_ptr", "columns_ptr", "query_ptr", "gallery_ptr", "gradient_ptr"}
INTEGERS = {"target_ptr": "i64"} | dict.fromkeys(
    ("flags_ptr", "row_counts_ptr", "column_counts_ptr"), "i32"
)
# The kernels that every tile goes through, with what they are compiled for besides the tile.
BUSY = {
    clip._clip_loss_lse_kernel: {},
    clip._clip_loss_gradient_kernel: {"PARTS": None},
    siglip._siglip_loss_kernel: {"PARTS": None, "BOOST": 1.0, "NEEDS_GRADIENT": True},
    ranking._retrieval_rank_kernel: {"BOTH": True},
}
OTHERS = [
    (clip._clip_loss_online_lse_kernel, {"BLOCK_F": clip._FLAGS}),
    (siglip._siglip_loss_kernel, {"PARTS": None, "BOOST": 1.0, "NEEDS_GRADIENT": False}),
    (ranking._retrieval_target_kernel, {}),
    (ranking._retrieval_rank_kernel, {"BOTH": False}),
]
# Kernels are bound to the interpreter, or to a GPU, when they are imported: a process of its own.
_NUMERICS = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-W", "ignore::RuntimeWarning"]
_NUMERICS += ["-p", "no:cacheprovider", str(Path(__file__).with_name("triton_numerics.py"))]


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


def _compile(kernel, dtype, precision, architecture, extra):
    """Compile a kernel as a launch would, for pointers and widths that are multiples of 16."""
    tile = triton_tiles.tile_of(precision, architecture)
    given = triton_tiles.constants(tile, precision) | {"BLOCK": tile.rows} | extra
    if "PARTS" in given:
        given["PARTS"] = tile.parts
    options = {name: given.pop(name) for name in ("num_warps", "num_stages")}
    signature, constants, attributes = {}, {}, {}
    aligned = [["tt.divisibility", 16]]
    for i, name in enumerate(kernel.arg_names):
        if name in given:
            signature[name], constants[(i,)] = "constexpr", given[name]
        elif name.endswith("_ptr"):
            kind = NAMES[dtype] if name in FEATURES else INTEGERS.get(name, "fp32")
            signature[name], attributes[(i,)] = f"*{kind}", aligned
        else:
            signature[name] = "i32"
            if name in ("D", "stride"):
                attributes[(i,)] = aligned
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def _usage(compiled, tmp_path):
    """Return the registers of a thread and the bytes that it spills."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    command = [tool, "--dump-resource-usage", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))


def _assert_fits(compiled, architecture, tmp_path):
    assert compiled.metadata.shared <= SHARED[architecture][0]
    registers, spilled = _usage(compiled, tmp_path)
    assert spilled <= SPILLED
    return registers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", BUSY, ids=lambda kernel: kernel.__name__)
def test_busy_kernels_use_tensor_cores_and_leave_room_for_two(kernel, architecture, tmp_path):
    compiled = _compile(kernel, torch.bfloat16, "half", architecture, BUSY[kernel])
    registers = _assert_fits(compiled, architecture, tmp_path)
    instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[architecture]
    assert instruction in compiled.asm["ptx"]
    assert "cp.async" in compiled.asm["ptx"]
    if architecture < 100:
        threads = 32 * compiled.metadata.num_warps
        assert 2 * registers * threads <= REGISTERS
        assert 2 * (compiled.metadata.shared + 1024) <= SHARED[architecture][1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("kernel", "extra"), OTHERS, ids=lambda x: getattr(x, "__name__", ""))
def test_other_kernels_fit(kernel, extra, architecture, tmp_path):
    compiled = _compile(kernel, torch.bfloat16, "half", architecture, extra)
    _assert_fits(compiled, architecture, tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("kernel", BUSY, ids=lambda kernel: kernel.__name__)
def test_fp32_uses_tf32_only_where_asked(kernel, precision, architecture, tmp_path):
    compiled = _compile(kernel, torch.float32, precision, architecture, BUSY[kernel])
    _assert_fits(compiled, architecture, tmp_path)
    has_tf32 = "tf32" in compiled.asm["ptx"]
    assert has_tf32 == (precision == "tf32")


@pytest.mark.parametrize("kernel", BUSY, ids=lambda kernel: kernel.__name__)
def test_fp16_uses_tensor_cores(kernel, tmp_path):
    extra = BUSY[kernel]
    if "BOOST" in extra:
        extra = extra | {"BOOST": triton_tiles.gradient_boost(torch.float16)}
    compiled = _compile(kernel, torch.float16, "half", 90, extra)
    _assert_fits(compiled, 90, tmp_path)
    assert "wgmma.mma_async" in compiled.asm["ptx"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_small_kernels_fit(architecture, tmp_path):
    sums = {"BLOCK_P": clip._PARTIALS}
    ranges = {"BLOCK": clip._VECTOR, "BOOST": 1.0, "num_warps": 8}
    for kernel, extra in (
        (clip._clip_loss_sum_kernel, sums),
        (clip._clip_loss_range_kernel, ranges),
    ):
        compiled = _compile(kernel, torch.bfloat16, "half", architecture, extra)
        _assert_fits(compiled, architecture, tmp_path)


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
