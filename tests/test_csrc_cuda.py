"""What csrc/cuda was compiled to, and the arithmetic that it shares with the CPU."""

import ctypes
import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_emulator import compiled

# Of a block, in bytes.
SHARED = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024, "sm_100": 227 * 1024}
REGISTERS = 65536


@pytest.fixture(scope="module")
def module():
    found = importlib.util.find_spec("medfast._CUDA")
    if found is None:
        pytest.skip("medfast is installed without its CUDA kernels")
    return Path(found.origin)


@pytest.fixture(scope="module")
def cuobjdump(module):
    """Run it on the module; it comes with Triton where CUDA's own is not installed."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.knobs.nvidia.cuobjdump.path)

    def run(*arguments):
        path = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"  # it calls nvdisasm
        return subprocess.run(
            [str(tool), *arguments, str(module)],
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    return run


@pytest.fixture(scope="module")
def usage(cuobjdump):
    """Registers, stack and static shared memory, by architecture and kernel."""
    found, architecture = {}, None
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if line.startswith("arch ="):
            architecture = line.split("=")[1].strip()
        elif line.strip().startswith("Function"):
            kernel = line.split()[1].rstrip(":")
        elif "REG:" in line:
            numbers = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)
            found[architecture, kernel] = {name: int(number) for name, number in numbers}
    return found


def _kernels(usage, architecture, name):
    return {k: n for (a, k), n in usage.items() if a == architecture and name in k}


def test_every_kernel_is_there_for_every_architecture(usage):
    if os.environ.get("MEDFAST_CUDA_ARCH"):
        pytest.skip("built for a chosen list of architectures")
    names = {kernel for _, kernel in usage}
    assert {a for a, _ in usage} == set(SHARED)
    assert {(a, k) for a in SHARED for k in names} == set(usage)


def test_no_kernel_spills(usage):
    spilled = {key: n for key, n in usage.items() if n["STACK"] or n["LOCAL"]}
    assert not spilled


def test_registers_leave_room_for_the_blocks_of_a_launch(usage):
    for (architecture, kernel), numbers in usage.items():
        if architecture != "sm_90a" and "clip_loss_block_kernel" in kernel:
            # Two blocks of eight warps.
            assert 2 * 256 * numbers["REG"] <= REGISTERS
        if architecture == "sm_90a" and "clip_loss_group_kernel" in kernel:
            # A block of twelve warps; two thirds of them take what the others give back, and would
            # wait for ever for what the block was not launched with.
            dealt_out = compiled("clip_loss.cpp").group_registers()
            assert dealt_out <= 384 * numbers["REG"] <= REGISTERS


def test_shared_memory_suffices(usage):
    library = compiled("clip_loss.cpp")
    sizes = (ctypes.c_int64 * 5)()
    library.shared_bytes(sizes)
    *by_blocks, sums_by_groups, gradient_by_groups = sizes
    for size in by_blocks:
        # Two blocks, and a KiB for each that the hardware takes.
        assert 2 * (size + 1024) <= SHARED["sm_80"] + 1024
    for size in (sums_by_groups, gradient_by_groups):
        assert size <= SHARED["sm_90a"]
    assert all(n["SHARED"] <= 48 * 1024 for n in usage.values())


@pytest.mark.parametrize(
    ("architecture", "kernel", "instruction"),
    [
        ("sm_80", "clip_loss_block_kernel", "HMMA.16816.F32"),
        ("sm_90a", "clip_loss_group_kernel", "HGMMA.64x128x16.F32"),
        ("sm_100", "clip_loss_block_kernel", "HMMA.16816.F32"),
    ],
)
def test_products_are_on_tensor_cores(usage, cuobjdump, architecture, kernel, instruction):
    names = list(_kernels(usage, architecture, kernel))
    if not names:
        pytest.skip(f"not built for {architecture}")
    # Sums and gradient, in bf16 and in fp16.
    assert len(names) == 4
    code = cuobjdump("-sass", "-arch", architecture, "-fun", ",".join(names))
    functions = code.split("Function : ")[1:]
    assert len(functions) == 4
    for function in functions:
        # A slab of 64 features: four steps, or 4 x 16 pieces of four.
        assert function.count(instruction) >= 8
        if architecture == "sm_90a":
            assert "UTMALDG.2D" in function
            assert "WARPGROUP.ARRIVE" in function
        else:
            assert "LDGSTS.E.BYPASS.128" in function


REAL = {torch.float32: ("fp32", ctypes.c_float), torch.float64: ("fp64", ctypes.c_double)}


def _call(name, dtype, *arguments):
    function = getattr(compiled("arithmetic.cpp"), f"{name}_{REAL[dtype][0]}")
    function.restype = ctypes.c_bool
    given = (
        ctypes.c_void_p(a.data_ptr())
        if isinstance(a, torch.Tensor)
        else ctypes.c_double(a)
        if isinstance(a, float)
        else ctypes.c_int64(a)
        for a in arguments
    )
    return function(*given)


def _logits(dtype, scale, rows=9, columns=33):
    generator = torch.Generator().manual_seed(0)
    cosines = torch.rand(rows, columns, generator=generator, dtype=torch.float64) * 2 - 1
    return (scale * cosines).to(dtype)


def _tolerance(dtype, scale):
    # A logit is rounded, which moves its exponential by as much.
    return (8 + 2 * abs(scale)) * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0, -100.0, 150.0])
def test_one_shift_gives_exact_sums_where_it_says_so(dtype, scale):
    logits = _logits(dtype, scale)
    found = torch.full((9,), torch.nan, dtype=dtype)
    suits = _call("sums", dtype, logits, 9, 33, scale, found)
    assert suits
    want = logits.double().logsumexp(1)
    torch.testing.assert_close(found.double(), want, rtol=0, atol=_tolerance(dtype, scale))


@pytest.mark.parametrize("dtype", REAL)
def test_what_one_shift_does_not_suit_is_noticed(dtype):
    found = torch.zeros(1, dtype=dtype)
    for scale, logits in [
        (151.0, torch.zeros(1, 4)),  # a scale that allows too wide a range
        (float("nan"), torch.zeros(1, 4)),
        (100.0, torch.full((1, 4), -90.0)),  # a row far from all: sums lose their last bits
        (10.0, torch.full((1, 4), 120.0)),  # features that are not normalised
        (10.0, torch.tensor([[0.0, 0.0, torch.nan, 0.0]])),
    ]:
        assert not _call("sums", dtype, logits.to(dtype), 1, 4, scale, found)


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("piece", [1, 7, 33, 40])
def test_a_running_maximum_gives_exact_sums_of_anything(dtype, piece):
    for scale in (1.0, 300.0, 1e4):
        logits = _logits(dtype, scale)
        logits[1] = -torch.inf
        logits[2, 3:] = -torch.inf
        logits[3, 5] = torch.nan
        logits[4, :] = logits[4, 0]
        found = torch.full((9,), torch.nan, dtype=dtype)
        _call("online", dtype, logits, 9, 33, piece, found)
        want = logits.double().logsumexp(1)
        torch.testing.assert_close(
            found.double(), want, rtol=0, atol=_tolerance(dtype, scale), equal_nan=True
        )


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize(("scale", "is_exact"), [(14.3, 0), (14.3, 1), (100.0, 0), (500.0, 1)])
def test_gradient_of_logits_from_one_exponential_or_two(dtype, scale, is_exact):
    logits = _logits(dtype, scale)
    generator = torch.Generator().manual_seed(1)
    d_rows, d_columns = (torch.randn(n, generator=generator).to(dtype) for n in logits.shape)
    lses = [logits.double().logsumexp(d).to(dtype) for d in (1, 0)]
    found = torch.full_like(logits, torch.nan)
    _call("gradient", dtype, logits, 9, 33, scale, *lses, d_rows, d_columns, is_exact, found)
    rows, columns = (x.double() for x in lses)
    along_rows = (logits.double() - rows[:, None]).exp() * d_rows.double()[:, None]
    along_columns = (logits.double() - columns).exp() * d_columns.double()
    allowed = _tolerance(dtype, scale) * (along_rows.abs() + along_columns.abs()) + 1e-38
    assert ((found - along_rows - along_columns).abs() <= allowed).all()
