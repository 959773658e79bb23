"""The Triton kernels: what they compute, in a process of its own, and what they compile to."""

import pytest
import torch
from triton_harness import (
    ARCHITECTURES,
    NAMES,
    REGISTERS,
    SHARED,
    Numerics,
    assert_fits,
    compile_kernel,
)

from medfast.ops import triton_tiles
from medfast.ops.clip import triton as clip
from medfast.ops.ranking import triton as ranking
from medfast.ops.siglip import triton as siglip

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
NUMERICS = Numerics("triton_numerics.py")


@pytest.fixture(scope="module", autouse=True)
def interpreter_run():
    """The numerical tests under the interpreter, which run beside this module's other tests."""
    with NUMERICS.interpreted() as run:
        yield run


def _compile(kernel, dtype, precision, architecture, extra):
    """Compile a kernel as a launch would, for pointers and widths that are multiples of 16."""
    tile = triton_tiles.tile_of(precision, architecture)
    given = triton_tiles.constants(tile, precision) | {"BLOCK": tile.rows} | extra
    if "PARTS" in given:
        given["PARTS"] = tile.parts
    options = {name: given.pop(name) for name in ("num_warps", "num_stages")}
    kinds = INTEGERS | dict.fromkeys(FEATURES, NAMES[dtype])
    return compile_kernel(kernel, architecture, given, options, kinds, aligned={"D", "stride"})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", BUSY, ids=lambda kernel: kernel.__name__)
def test_busy_kernels_use_tensor_cores_and_leave_room_for_two(kernel, architecture, tmp_path):
    compiled = _compile(kernel, torch.bfloat16, "half", architecture, BUSY[kernel])
    registers = assert_fits(compiled, architecture, tmp_path)
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
    assert_fits(compiled, architecture, tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("kernel", BUSY, ids=lambda kernel: kernel.__name__)
def test_fp32_uses_tf32_only_where_asked(kernel, precision, architecture, tmp_path):
    compiled = _compile(kernel, torch.float32, precision, architecture, BUSY[kernel])
    assert_fits(compiled, architecture, tmp_path)
    has_tf32 = "tf32" in compiled.asm["ptx"]
    assert has_tf32 == (precision == "tf32")


@pytest.mark.parametrize("kernel", BUSY, ids=lambda kernel: kernel.__name__)
def test_fp16_uses_tensor_cores(kernel, tmp_path):
    extra = BUSY[kernel]
    if "BOOST" in extra:
        extra = extra | {"BOOST": triton_tiles.gradient_boost(torch.float16)}
    compiled = _compile(kernel, torch.float16, "half", 90, extra)
    assert_fits(compiled, 90, tmp_path)
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
        assert_fits(compiled, architecture, tmp_path)


def test_values_under_the_interpreter(interpreter_run):
    NUMERICS.check(interpreter_run)


@pytest.mark.gpu
def test_values_on_a_gpu():
    NUMERICS.check_on_a_gpu()
