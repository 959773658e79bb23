"""sparc_loss's Triton kernels: what they compute, in a process of its own, and compile to."""

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
    each_precision,
)

from medfast.ops.sparc import triton as sparc

KERNELS = [sparc._sparc_loss_forward_kernel, sparc._sparc_loss_gradient_kernel]
# Programs that are to fit on a multiprocessor.
PROGRAMS = 3
FEATURES = {"patches_ptr", "tokens_ptr", "shares_ptr", "pulls_ptr", "d_similarity_ptr"}
OTHERS = dict.fromkeys(("places_ptr", "lowest_ptr", "length_ptr"), "i32") | dict.fromkeys(
    ("token_mask_ptr", "patch_mask_ptr"), "u8"
)
NUMERICS = Numerics("triton_sparc_numerics.py")


@pytest.fixture(scope="module", autouse=True)
def interpreter_run():
    """The numerical tests under the interpreter, which run beside this module's other tests."""
    with NUMERICS.interpreted() as run:
        yield run


def _compile(kernel, dtype, precision, architecture, has_mask=True, has_threshold=False):
    """Compile a kernel as a launch would, for pointers and widths that are multiples of 16."""
    given = sparc.constants(sparc.blocks_of(precision, architecture), precision)
    options = {name: given.pop(name) for name in ("num_warps", "num_stages", "maxnreg")}
    given |= {"HAS_MASK": has_mask, "HAS_THRESHOLD": has_threshold}
    kinds = OTHERS | dict.fromkeys(FEATURES, NAMES[dtype]) | {"threshold": "fp32"}
    if dtype == torch.bfloat16:
        kinds |= dict.fromkeys(("d_patches_ptr", "d_tokens_ptr"), "bf16")
    return compile_kernel(kernel, architecture, given, options, kinds, aligned={"D", "stride"})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_kernels_use_tensor_cores_and_leave_room_for_three(kernel, dtype, architecture, tmp_path):
    compiled = _compile(kernel, dtype, "half", architecture)
    registers = assert_fits(compiled, architecture, tmp_path)
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
    assert_fits(compiled, architecture, tmp_path)
    assert ("tf32" in compiled.asm["ptx"]) == (precision == "tf32")


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_kernels_fit_without_a_mask_and_with_a_threshold(kernel, tmp_path):
    compiled = _compile(kernel, torch.bfloat16, "half", 90, has_mask=False, has_threshold=True)
    assert_fits(compiled, 90, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@each_precision
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_all_that_a_launch_may_compile_fits(kernel, dtype, precision, architecture, tmp_path):
    for has_mask in (False, True):
        for has_threshold in (False, True):
            given = (dtype, precision, architecture, has_mask, has_threshold)
            assert_fits(_compile(kernel, *given), architecture, tmp_path)


def test_values_under_the_interpreter(interpreter_run):
    NUMERICS.check(interpreter_run)


@pytest.mark.gpu
def test_values_on_a_gpu():
    NUMERICS.check_on_a_gpu()
