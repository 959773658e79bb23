import contextlib
import ctypes
import importlib
import sys
import types

import numpy as np
import pytest
import torch
from cuda_emulator import compiled

import medfast
from medfast.ops import dispatch, normalize_crops
from medfast.ops.pixels import reference

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Images, their size, a crop's: one pixel; rows of 16 values; no multiple of anything; all of it.
SIZES = [(1, (1, 1), (1, 1)), (3, (32, 48), (20, 16)), (5, (37, 53), (19, 31)), (2, (9, 7), (9, 7))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLS = ["torch", "reference"]


def _images(count, size, device="cpu"):
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, *size, 3), generator=generator, dtype=torch.uint8)
    return images.to(device).permute(0, 3, 1, 2)


def _offsets(count, size, crop, device="cpu"):
    """Corners first, then others."""
    most = torch.tensor([a - b for a, b in zip(size, crop, strict=True)])
    generator = torch.Generator().manual_seed(count)
    offsets = (torch.rand(count, 2, generator=generator) * (most + 1)).int()
    offsets[0] = most
    offsets[1:2] = 0
    return offsets.to(device)


def _torchvision(images, offsets, size, dtype):
    from torchvision.transforms.v2 import functional as F

    crops = [
        F.crop(image, y, x, *size) for image, (y, x) in zip(images, offsets.tolist(), strict=True)
    ]
    return F.normalize(F.to_dtype(torch.stack(crops), torch.float32, scale=True), MEAN, STD).to(
        dtype
    )


def _assert_rounded(found, want, dtype):
    """Both are of one number in fp32, whose roundings differ by 1e-6 at most."""
    torch.testing.assert_close(
        found.double(), want.double(), rtol=torch.finfo(dtype).eps, atol=1e-6
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "size", "crop"), SIZES)
def test_crops_are_those_of_torchvision(impl, dtype, count, size, crop):
    images, offsets = _images(count, size), _offsets(count, size, crop)
    found = normalize_crops(images, MEAN, STD, offsets=offsets, size=crop, dtype=dtype, impl=impl)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    _assert_rounded(found, _torchvision(images, offsets, crop, dtype), dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_offsets_and_size_it_is_the_whole_image(impl):
    images = _images(2, (6, 5))
    found = normalize_crops(images, MEAN, STD, dtype=torch.float32, impl=impl)
    zeros = torch.zeros(2, 2, dtype=torch.int32)
    _assert_rounded(found, _torchvision(images, zeros, (6, 5), torch.float32), torch.float32)
    corner = normalize_crops(images, MEAN, STD, size=(2, 3), dtype=torch.float32, impl=impl)
    assert torch.equal(corner, found[:, :, :2, :3])


@pytest.mark.parametrize("impl", IMPLS)
def test_white_black_and_the_mean_are_exact_in_fp64(impl):
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    found = normalize_crops(images, [0.2] * 3, [0.4] * 3, dtype=torch.float64, impl=impl)
    want = torch.tensor([-0.5, 0.0, 2.0], dtype=torch.float64).expand(1, 3, 1, 3)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-15)


def test_other_layouts_in_memory_give_the_same():
    images, offsets = _images(3, (12, 10)), _offsets(3, (12, 10), (5, 4))
    want = normalize_crops(images, MEAN, STD, offsets=offsets, size=(5, 4))
    wider = torch.full((3, 3, 12, 13), 9, dtype=torch.uint8)
    wider[..., :10] = images
    apart = torch.stack([offsets, offsets], 1)[:, 1]
    for other in (images.contiguous(), wider[..., :10]):
        assert torch.equal(normalize_crops(other, MEAN, STD, offsets=apart, size=(5, 4)), want)


def test_a_small_workspace_changes_nothing(monkeypatch):
    images, offsets = _images(5, (12, 10)), _offsets(5, (12, 10), (5, 4))
    want = normalize_crops(images, MEAN, STD, offsets=offsets, size=(5, 4))
    monkeypatch.setenv("MEDFAST_WORKSPACE_MB", "0.0005")
    assert torch.equal(normalize_crops(images, MEAN, STD, offsets=offsets, size=(5, 4)), want)


def test_it_compiles_to_one_graph():
    images, offsets = _images(3, (12, 10)), _offsets(3, (12, 10), (5, 4))

    def crops(images, offsets):
        return normalize_crops(images, MEAN, STD, offsets=offsets, size=(5, 4))

    compiled = torch.compile(crops, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images, offsets), crops(images, offsets))


GOOD = {
    "images": _images(2, (6, 5)),
    "mean": MEAN,
    "std": STD,
    "offsets": torch.zeros(2, 2, dtype=torch.int32),
    "size": (3, 2),
}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"images": GOOD["images"].float()}, r"images must be uint8 \[B, 3, H, W\].*got .*float32"),
        ({"images": GOOD["images"].permute(0, 2, 3, 1)}, r"images must .*got .*\[2, 6, 5, 3\]"),
        ({"images": [1]}, "images must .*list"),
        ({"mean": (0.5, 0.5)}, "mean must be three finite numbers"),
        ({"std": (0.5, 0.5, float("nan"))}, "std must be three finite numbers"),
        ({"std": (0.5, 0.5, 0.0)}, "std must be above 0"),
        ({"dtype": torch.uint8}, r"dtype must be one of torch\.bfloat16"),
        ({"size": (7, 2)}, r"size must be from 1 to those of the images, 6 x 5; got \(7, 2\)"),
        ({"size": (3, 0)}, "size must be from 1"),
        ({"offsets": torch.zeros(2, 2)}, "offsets must be int32"),
        ({"offsets": torch.zeros(3, 2, dtype=torch.int32)}, r"int32 \[2, 2\]; got .*\[3, 2\]"),
        ({"offsets": [0, 0]}, "offsets must be int32"),
        ({"offsets": torch.tensor([[0, 0], [4, 0]]).int()}, r"to \[3, 3\].*got \[4, 0\]"),
        ({"offsets": torch.tensor([[0, -1], [0, 0]]).int()}, r"got \[0, -1\]"),
        ({"impl": "cudaa"}, "impl 'cudaa' is not known"),
    ],
)
def test_what_does_not_fit_is_named(given, words):
    with pytest.raises(ValueError, match=words):
        normalize_crops(**(GOOD | given))


def test_auto_does_not_choose_the_kernel():
    assert dispatch.choose("normalize_crops", "auto", GOOD["images"]) == "torch"
    assert "cuda" in dispatch.IMPLEMENTATIONS["normalize_crops"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_an_explicit_request_is_refused_not_replaced():
    with pytest.raises(RuntimeError, match=r"impl='cuda' cannot run here: .*Use impl='torch'"):
        normalize_crops(GOOD["images"], MEAN, STD, impl="cuda")


ON_A_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
WIDE = [(7, (301, 299), (224, 224)), (2, (64, 64), (64, 64)), (3, (40, 1100), (33, 1001))]


@pytest.fixture(params=["cpu", ON_A_GPU])
def kernel(request, monkeypatch, uninitialised_is_nan):
    """The module that launches, with its `device`: on a CPU threads run one after the other."""
    name = "medfast.ops.pixels.cuda"
    with contextlib.suppress(ImportError):
        # Before the stand-in: the module keeps what it was imported with.
        importlib.import_module(name)
    if request.param == "cuda":
        return pytest.importorskip(name, reason="the CUDA kernels are not built"), "cuda"
    stand_in = types.SimpleNamespace(normalize_crops=_on_a_cpu)
    monkeypatch.setitem(sys.modules, "medfast._CUDA", stand_in)
    monkeypatch.setattr(medfast, "_CUDA", stand_in, raising=False)
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "_CUDA", stand_in)
    monkeypatch.setattr(module, "_stream", lambda images: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return module, "cpu"


def _on_a_cpu(images, offsets, *others):
    *sizes, factor, shift, out, dtype, _ = others
    compiled("normalize_crops.cpp").normalize_crops(
        *map(ctypes.c_void_p, (images, offsets)),
        (ctypes.c_int64 * 5)(*sizes),
        (ctypes.c_float * 6)(*factor, *shift),
        ctypes.c_void_p(out),
        ctypes.c_bool(dtype == 1),
    )


def _crops(kernel, images, offsets, size, dtype):
    factor, shift = [1 / (255 * s) for s in STD], [-m / s for m, s in zip(MEAN, STD, strict=True)]
    return kernel[0].normalize_crops(images, factor, shift, offsets, *size, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "size", "crop"), SIZES + WIDE)
def test_the_kernel_is_exact_to_rounding(kernel, count, size, crop, dtype):
    device = kernel[1]
    if device == "cpu" and dtype == torch.float16:
        pytest.skip("a GPU rounds to fp16")
    images, offsets = _images(count, size, device), _offsets(count, size, crop, device)
    found = _crops(kernel, images, offsets, crop, dtype)
    assert found.is_contiguous(memory_format=torch.channels_last)
    truth = reference.normalize_crops(images, MEAN, STD, offsets, crop, torch.float64)
    _assert_rounded(found, truth, dtype)
    assert torch.equal(found, _crops(kernel, images.contiguous(), offsets, crop, dtype))


def test_the_kernel_takes_whole_images(kernel):
    images = _images(2, (33, 48), kernel[1])
    found = _crops(kernel, images, None, (33, 48), torch.float32)
    truth = reference.normalize_crops(images, MEAN, STD, None, (33, 48), torch.float64)
    _assert_rounded(found, truth, torch.float32)


@pytest.mark.parametrize("first", [0, 1, 3])
def test_the_kernel_writes_crops_and_nothing_else(kernel, first):
    module, device = kernel
    images, offsets = _images(3, (9, 40), device), _offsets(3, (9, 40), (4, 17), device)
    length = 3 * 4 * 17 * 3
    memory = torch.full((first + length + 16,), 7.0, device=device)
    module._CUDA.normalize_crops(
        *(images.data_ptr(), offsets.data_ptr(), 3, 9, 40, 4, 17, [1.0] * 3, [0.0] * 3),
        *(memory[first:].data_ptr(), 0, module._stream(images)),
    )
    assert (memory[:first] == 7).all()
    assert (memory[first + length :] == 7).all()
    want = reference.normalize_crops(
        images, [0] * 3, [1 / 255] * 3, offsets, (4, 17), torch.float32
    )
    found = memory[first : first + length].view(3, 4, 17, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, want)


def test_the_kernel_stays_within_the_images(kernel):
    images = _images(2, (9, 7), kernel[1])
    outside = torch.tensor([[-4, 100], [100, -1]], dtype=torch.int32, device=kernel[1])
    inside = torch.tensor([[0, 4], [5, 0]], dtype=torch.int32, device=kernel[1])
    found, want = (
        _crops(kernel, images, offsets, (4, 3), torch.bfloat16) for offsets in (outside, inside)
    )
    assert torch.equal(found, want)


def test_the_registered_op_is_known_to_torch(kernel):
    images, offsets = _images(3, (12, 10), kernel[1]), _offsets(3, (12, 10), (5, 4), kernel[1])
    arguments = (images, [0.1] * 3, [0.2] * 3, offsets, 5, 4, torch.bfloat16)
    torch.library.opcheck(kernel[0].normalize_crops, arguments)


def test_bf16_is_rounded_to_nearest_even():
    values = torch.cat([torch.randn(10_000), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 0.0, -3e-39])])
    found = np.empty(len(values), np.uint16)
    compiled("normalize_crops.cpp").round_to_bf16(
        ctypes.c_void_p(values.data_ptr()),
        ctypes.c_int64(len(values)),
        ctypes.c_void_p(found.ctypes.data),
    )
    assert torch.equal(
        torch.from_numpy(found.view(np.int16)).view(torch.bfloat16), values.bfloat16()
    )


def test_the_arithmetic_in_fp64_is_the_definition():
    normalized = compiled("normalize_crops.cpp").normalized_in_fp64
    normalized.restype = ctypes.c_double
    for value in (0, 1, 128, 255):
        for mean, std in zip(MEAN, STD, strict=True):
            found = normalized(
                value, ctypes.c_double(1 / (255 * std)), ctypes.c_double(-mean / std)
            )
            assert found == pytest.approx((value / 255 - mean) / std, abs=1e-15)


def test_a_crop_whose_values_pass_32_bits_is_refused():
    kernels = pytest.importorskip("medfast._CUDA", reason="the CUDA kernels are not built")
    sizes = (1, 2**17, 2**17, 2**17, 2**17)
    with pytest.raises(ValueError, match=r"less than 2\^32 values"):
        kernels.normalize_crops(0, 0, *sizes, [1.0] * 3, [0.0] * 3, 0, 0, 0)


@pytest.mark.gpu
def test_offsets_into_images_pass_32_bits():
    images = torch.zeros(512, 1200, 1200, 3, dtype=torch.uint8, device="cuda")
    images[-1, -1, -1] = 255
    corners = torch.full((512, 2), 1199, dtype=torch.int32, device="cuda")
    found = normalize_crops(
        images.permute(0, 3, 1, 2), [0.0] * 3, [1.0] * 3, offsets=corners, size=(1, 1), impl="cuda"
    )
    assert found.flatten(1).amax(1).tolist() == [0.0] * 511 + [1.0]


@pytest.mark.gpu
def test_the_kernel_is_compiled_and_captured_into_graphs():
    images, offsets = _images(3, (12, 10), "cuda"), _offsets(3, (12, 10), (5, 4), "cuda")

    def crops(images, offsets):
        return normalize_crops(images, MEAN, STD, offsets=offsets, size=(5, 4), impl="cuda")

    want = crops(images, offsets)
    assert torch.equal(torch.compile(crops, fullgraph=True)(images, offsets), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = crops(images, offsets)
    graph.replay()
    assert torch.equal(captured, want)
