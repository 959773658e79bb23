"""The kernels over all pairs of tokens: what they compute, and what they compile to."""

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

from medfast.ops import triton_words
from medfast.ops.filip import triton as filip
from medfast.ops.local_alignment import triton as alignment

MAXIMA = filip._filip_loss_maxima_kernel
SCORES = alignment._local_alignment_loss_kernel
GRADIENT = alignment._local_alignment_loss_gradient_kernel
WORDS = triton_words._word_product_kernel
SUMS = triton_words._sum_over_words_kernel
# The kernels that multiply, with what they are compiled for besides the tile.
BUSY = {
    MAXIMA: {"PIECES": 1, "SLOT": 128, "NEEDS_PLACES": True},
    SCORES: {"SLOT": 128},
    GRADIENT: {"SLOT": 128},
    WORDS: {"HAS_FACTORS": True},
    SUMS: {"IS_PACKED": True},
}
OTHERS = {
    filip._filip_loss_pieces_kernel: {
        "PIECES": 8,
        "LONGEST": 128,
        "NEEDS_PLACES": True,
        "BLOCK": filip._VECTOR,
    },
    filip._filip_loss_gradient_kernel: {
        "PIECES": 1,
        "LONGEST": 128,
        "BLOCK_R": filip._WORDS,
        "BLOCK_C": filip._PATCHES,
    },
}
FEATURES = {"words_ptr", "patches_ptr", "gradient_ptr", "left_ptr", "right_ptr", "grams_ptr"}
FEATURES |= {"exponentials_ptr", "d_similarity_ptr", "weighted_ptr"}
OTHER_POINTERS = dict.fromkeys(
    ("order_ptr", "starts_ptr", "buckets_ptr", "counts_ptr", "places_ptr"), "i32"
) | dict.fromkeys(("mask_ptr", "best_patch_ptr", "best_word_ptr"), "u8")
# Widths that are multiples of 16. Those of FILIP's patches are not.
ALIGNED = {"D", "E", "stride", "width", "left_stride", "right_stride"}
NUMERICS = Numerics("triton_token_numerics.py")


@pytest.fixture(scope="module", autouse=True)
def interpreter_run():
    """The numerical tests under the interpreter, which run beside this module's other tests."""
    with NUMERICS.interpreted() as run:
        yield run


def _given(kernel, dtype, precision, architecture, words=128):
    """Return what a launch compiles a kernel that multiplies for."""
    if kernel is MAXIMA:
        shape = filip.shape_of(precision, architecture)
    elif kernel in (SCORES, GRADIENT):
        shape = alignment.shape_of(precision, architecture, words, kernel is GRADIENT)
    else:
        shape = triton_words.product_shape(precision, architecture)
    given = triton_words.constants(shape, precision) | BUSY[kernel]
    if kernel in (MAXIMA, GRADIENT):
        given["PARTS"] = shape.parts
    if kernel in (SCORES, GRADIENT):
        given["MAX_TEMPERATURE"] = alignment.max_temperature(dtype)
    return given


def _compile(kernel, dtype, architecture, given):
    options = {name: given[name] for name in ("num_warps", "num_stages") if name in given}
    aligned = ALIGNED | ({"P"} if kernel in (SCORES, GRADIENT) else set())
    kinds = OTHER_POINTERS | dict.fromkeys(FEATURES, NAMES[dtype])
    return compile_kernel(kernel, architecture, given, options, kinds, aligned)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", BUSY, ids=lambda kernel: kernel.__name__)
def test_busy_kernels_use_tensor_cores(kernel, architecture, tmp_path):
    given = _given(kernel, torch.bfloat16, "half", architecture)
    compiled = _compile(kernel, torch.bfloat16, architecture, given)
    registers = assert_fits(compiled, architecture, tmp_path)
    instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[architecture]
    assert instruction in compiled.asm["ptx"]
    assert "cp.async" in compiled.asm["ptx"]
    if kernel is MAXIMA:
        # One multiplies while the other is at its maxima.
        assert 2 * registers * 32 * given["num_warps"] <= REGISTERS
        assert 2 * (compiled.metadata.shared + 1024) <= SHARED[architecture][1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("kernel", BUSY, ids=lambda kernel: kernel.__name__)
def test_fp32_uses_tf32_only_where_asked(kernel, precision, architecture, tmp_path):
    given = _given(kernel, torch.float32, precision, architecture)
    compiled = _compile(kernel, torch.float32, architecture, given)
    assert_fits(compiled, architecture, tmp_path)
    has_tf32 = "tf32" in compiled.asm["ptx"]
    assert has_tf32 == (precision == "tf32")


@pytest.mark.parametrize("kernel", BUSY, ids=lambda kernel: kernel.__name__)
def test_fp16_uses_tensor_cores(kernel, tmp_path):
    given = _given(kernel, torch.float16, "half", 90)
    compiled = _compile(kernel, torch.float16, 90, given)
    assert_fits(compiled, 90, tmp_path)
    assert "wgmma.mma_async" in compiled.asm["ptx"]


@pytest.mark.parametrize(("architecture", "slot"), [(80, 32), (90, 64), (100, 32)])
@pytest.mark.parametrize("kernel", [MAXIMA, SCORES, GRADIENT], ids=lambda kernel: kernel.__name__)
def test_short_captions_fit(kernel, architecture, slot, tmp_path):
    given = _given(kernel, torch.bfloat16, "half", architecture) | {"SLOT": slot}
    assert_fits(_compile(kernel, torch.bfloat16, architecture, given), architecture, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@each_precision
def test_all_that_a_launch_may_compile_fits(dtype, precision, architecture, tmp_path):
    slots = [{"SLOT": slot} for slot in triton_words.slots_for(128)]
    flags = (False, True)
    variants = {
        MAXIMA: [
            slot | {"NEEDS_PLACES": needs_places, "PIECES": pieces}
            for slot in slots
            for needs_places in flags
            for pieces in (1, 2)
        ],
        SCORES: slots,
        GRADIENT: slots,
        WORDS: [{"HAS_FACTORS": has_factors} for has_factors in flags],
        SUMS: [{"IS_PACKED": is_packed} for is_packed in flags],
    }
    for kernel, choices in variants.items():
        for choice in choices:
            given = _given(kernel, dtype, precision, architecture) | choice
            compiled = _compile(kernel, dtype, architecture, given)
            assert_fits(compiled, architecture, tmp_path)


@pytest.mark.parametrize(
    ("words", "precision", "architecture"),
    [(256, "half", 90), (1024, "half", 80), (1024, "half", 100), (1024, "tf32", 80)],
)
@pytest.mark.parametrize("kernel", [SCORES, GRADIENT], ids=lambda kernel: kernel.__name__)
def test_long_captions_compile(kernel, words, precision, architecture):
    dtype = torch.bfloat16 if precision == "half" else torch.float32
    given = _given(kernel, dtype, precision, architecture, words) | {"SLOT": words}
    compiled = _compile(kernel, dtype, architecture, given)
    assert compiled.metadata.shared <= SHARED[architecture][0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", OTHERS, ids=lambda kernel: kernel.__name__)
def test_other_kernels_fit(kernel, architecture, tmp_path):
    compiled = _compile(kernel, torch.bfloat16, architecture, OTHERS[kernel])
    assert_fits(compiled, architecture, tmp_path)


def test_values_under_the_interpreter(interpreter_run):
    NUMERICS.check(interpreter_run)


@pytest.mark.gpu
def test_values_on_a_gpu():
    NUMERICS.check_on_a_gpu()
