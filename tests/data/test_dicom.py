# ruff: noqa: E402 - the tests need pydicom, which may not be there.
import io
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from medfast.data import decode as module
from medfast.data.decode import ImageError, decode
from medfast.data.dicom import decode_dicom, is_dicom

pydicom = pytest.importorskip("pydicom")

from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)


def _dataset(pixels, bits=None, signed=False, **elements):
    dataset = Dataset()
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    dataset.SOPInstanceUID = "1.2.826.0.1.3680043.8.498.1"
    pixels = np.asarray(pixels)
    frames = pixels.shape[0] if elements.get("NumberOfFrames") else None
    shape = pixels.shape[1:] if frames else pixels.shape
    dataset.Rows, dataset.Columns = shape[:2]
    dataset.SamplesPerPixel = 3 if len(shape) == 3 else 1
    if dataset.SamplesPerPixel == 3:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = "RGB" if dataset.SamplesPerPixel == 3 else "MONOCHROME2"
    dataset.BitsAllocated = 8 * pixels.dtype.itemsize
    dataset.BitsStored = bits or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(signed)
    for name, value in elements.items():
        setattr(dataset, name, value)
    if pixels.dtype.kind == "f":
        name = {4: "FloatPixelData", 8: "DoubleFloatPixelData"}[pixels.dtype.itemsize]
        setattr(dataset, name, pixels.tobytes())
    else:
        data = pixels.tobytes()
        dataset.PixelData = data + bytes(len(data) % 2)
        dataset["PixelData"].VR = "OW" if pixels.dtype.itemsize > 1 else "OB"
    return dataset


def _bytes(dataset, syntax=ExplicitVRLittleEndian):
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _shown(pixels, syntax=ExplicitVRLittleEndian, **options):
    found = decode_dicom(_bytes(_dataset(pixels, **options), syntax))
    assert found.dtype == np.uint8
    return found


def _bundled(name):
    return Path(get_testdata_file(name, download=False)).read_bytes()


def _close(found, expected, tolerance=0.5):
    assert found.shape == expected.shape
    # Rounded: at most half a step, and what float32 adds.
    assert np.abs(found - expected).max() <= tolerance + 1e-3


VALUES = np.array([[-1024, -160, -159, -1, 0], [1, 40, 239, 240, 3000]], np.int16)
CT = {"signed": True, "RescaleSlope": 1, "RescaleIntercept": 0}


def _linear(x, center, width):
    """PS3.3 C.11.2.1.2.1, case by case."""
    if x <= center - 0.5 - (width - 1) / 2:
        return 0.0
    if x > center - 0.5 + (width - 1) / 2:
        return 255.0
    return ((x - (center - 0.5)) / (width - 1) + 0.5) * 255


def _linear_exact(x, center, width):
    """PS3.3 C.11.2.1.3.2."""
    if x <= center - width / 2:
        return 0.0
    if x > center + width / 2:
        return 255.0
    return ((x - center) / width + 0.5) * 255


def _sigmoid(x, center, width):
    """PS3.3 C.11.2.1.3.1."""
    with np.errstate(over="ignore"):
        return 255 / (1 + np.exp(-4 * (x - center) / width))


@pytest.mark.parametrize(("center", "width"), [(40, 400), (0.5, 2), (-600, 1500.5), (40, 1)])
@pytest.mark.parametrize(
    ("name", "formula"),
    [
        (None, _linear),
        ("LINEAR", _linear),
        ("LINEAR_EXACT", _linear_exact),
        ("SIGMOID", _sigmoid),
    ],
)
def test_a_window_is_applied_by_its_formula(name, formula, center, width):
    function = {} if name is None else {"VOILUTFunction": name}
    found = _shown(VALUES, WindowCenter=center, WindowWidth=width, **CT, **function)
    expected = np.array([[formula(float(x), center, width) for x in row] for row in VALUES])
    _close(found, expected)


def test_the_first_of_several_windows_is_applied():
    found = _shown(VALUES, WindowCenter=[40, 300], WindowWidth=[400, 1500], **CT)
    assert np.array_equal(found, _shown(VALUES, WindowCenter=40, WindowWidth=400, **CT))


@pytest.mark.parametrize(
    "window",
    [
        {"WindowCenter": 40},
        {"WindowCenter": 40, "WindowWidth": 0},
        {"WindowCenter": 40, "WindowWidth": -5},
        {"WindowCenter": None, "WindowWidth": None},
    ],
)
def test_what_is_no_window_is_not_applied(window):
    assert np.array_equal(_shown(VALUES, **window, **CT), _shown(VALUES, **CT))


@pytest.mark.parametrize(("slope", "intercept"), [(2.5, -1024), (-1, 100), (0.001, 0)])
def test_values_are_rescaled_before_the_window(slope, intercept):
    stored = np.array([[0, 400, 1000], [1063, 2000, 4095]], np.uint16)
    center, width = 600 * slope + intercept, 900 * abs(slope)
    found = _shown(
        stored,
        bits=12,
        RescaleSlope=slope,
        RescaleIntercept=intercept,
        WindowCenter=f"{center:.8g}",
        WindowWidth=f"{width:.8g}",
        VOILUTFunction="LINEAR_EXACT",
    )
    expected = [
        [_linear_exact(x * slope + intercept, center, width) for x in r] for r in stored.tolist()
    ]
    _close(found, np.array(expected))


def test_without_a_window_the_values_are_stretched():
    stored = np.array([[100, 612], [1124, 2148]], np.uint16)
    assert _shown(stored, bits=12).tolist() == [[0, 64], [128, 255]]
    # The slope does not matter, its sign does.
    assert _shown(stored, RescaleSlope=-3, RescaleIntercept=9).tolist() == [[255, 191], [128, 0]]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32])
def test_a_constant_image_is_black(dtype):
    signed = np.dtype(dtype).kind == "i"
    assert not _shown(np.full((3, 4), 77, dtype), signed=signed).any()


def test_monochrome1_is_inverted():
    one = {"PhotometricInterpretation": "MONOCHROME1"}
    assert np.array_equal(_shown(VALUES, **CT, **one), 255 - _shown(VALUES, **CT))
    window = {"WindowCenter": 40, "WindowWidth": 400}
    assert np.array_equal(
        _shown(VALUES, **CT, **one, **window), 255 - _shown(VALUES, **CT, **window)
    )


def test_bits_that_are_not_stored_are_not_shown():
    """12 bits in 16, the others set by an overlay, as old files have it."""
    stored = np.array([[0, 1000], [2000, 4095]], np.uint16)
    dirty = stored | np.array([[0xF000, 0x1000], [0, 0x8000]], np.uint16)
    assert np.array_equal(_shown(dirty, bits=12), _shown(stored, bits=12))


def test_signed_values_of_12_bits_keep_their_sign():
    values = np.array([[-2048, -1024], [0, 2047]], np.int16)
    packed = (values & 0x0FFF).astype(np.uint16)
    assert np.array_equal(_shown(packed, bits=12, signed=True), _shown(values, signed=True))


@pytest.mark.parametrize(
    "padding",
    [
        {"PixelPaddingValue": -2000},
        {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1500},
        {"PixelPaddingValue": -1500, "PixelPaddingRangeLimit": -2000},
    ],
)
def test_padding_does_not_count_when_values_are_stretched(padding):
    values = np.array([[-2000, 0, 51], [102, 204, 255]], np.int16)
    if len(padding) == 2:
        values = np.concatenate([values, [[-1700, -1500, 0]]]).astype(np.int16)
    found = _shown(values, **CT, **padding)
    assert np.array_equal(found, np.clip(values, 0, 255))
    assert not np.array_equal(_shown(values, **CT), found)


def test_an_image_of_padding_alone_is_black():
    assert not _shown(np.full((2, 2), -2000, np.int16), PixelPaddingValue=-2000, **CT).any()


def _table(first, entries, bits, vr="US"):
    item = Dataset()
    item.add_new("LUTDescriptor", "US" if first >= 0 else "SS", [len(entries), first, bits])
    item.add_new("LUTData", vr, entries if vr == "US" else np.array(entries, "<u2").tobytes())
    return Sequence([item])


@pytest.mark.parametrize("vr", ["US", "OW"])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_voi_table_comes_before_a_window(vr, bits):
    entries = [0, 1, 2**bits // 3, 2**bits - 1]
    stored = np.array([[0, 9, 10, 11], [12, 13, 14, 4000]], np.uint16)
    found = _shown(
        stored,
        VOILUTSequence=_table(10, entries, bits, vr),
        WindowCenter=5,
        WindowWidth=2,
    )
    # Values before the first entry have its value, those after the last that one's.
    at = [[0, 0, 0, 1], [2, 3, 3, 3]]
    _close(found, np.array(entries)[at] * 255 / (2**bits - 1))


def test_a_voi_table_may_start_below_zero():
    values = np.array([[-9, -2, -1], [0, 1, 9]], np.int16)
    found = _shown(values, signed=True, VOILUTSequence=_table(-2, [0, 50, 100, 255], 8))
    assert found.tolist() == [[0, 0, 50], [100, 255, 255]]


def test_a_modality_table_comes_before_the_window():
    stored = np.array([[0, 1, 2], [3, 4, 9]], np.uint8)
    found = _shown(
        stored,
        ModalityLUTSequence=_table(1, [100, 300, 200, 1000], 16),
        WindowCenter=200,
        WindowWidth=400,
        VOILUTFunction="LINEAR_EXACT",
    )
    meant = [[100, 100, 300], [200, 1000, 1000]]
    _close(found, np.array([[_linear_exact(x, 200, 400) for x in row] for row in meant]))


def _functional_groups(center, slope):
    voi, transformation, groups = Dataset(), Dataset(), Dataset()
    voi.WindowCenter, voi.WindowWidth = center, 400
    transformation.RescaleSlope, transformation.RescaleIntercept = slope, -1000
    groups.FrameVOILUTSequence = Sequence([voi])
    groups.PixelValueTransformationSequence = Sequence([transformation])
    return groups


@pytest.mark.parametrize("where", ["PerFrame", "Shared"])
def test_an_enhanced_image_keeps_its_window_in_functional_groups(where):
    stored = np.array([[0, 400], [800, 1200]], np.uint16)
    groups = [_functional_groups(40, 1)]
    if where == "PerFrame":
        groups.append(_functional_groups(500, 2))
    found = _shown(
        np.stack([stored, stored[::-1]]),
        NumberOfFrames=2,
        **{f"{where}FunctionalGroupsSequence": Sequence(groups)},
    )
    _close(found, np.array([[_linear(x - 1000.0, 40, 400) for x in row] for row in stored]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float_pixels_are_stretched_over_their_finite_values(dtype):
    values = np.array([[-1.0, 0.0, 1.0], [np.nan, np.inf, -np.inf]], dtype)
    dataset = _dataset(values)
    for name in ("BitsStored", "HighBit", "PixelRepresentation"):
        del dataset[name]
    assert decode_dicom(_bytes(dataset)).tolist() == [[0, 128, 255], [0, 255, 0]]


def test_values_of_32_bits_keep_their_depth():
    """Neighbours that float32 cannot tell apart."""
    stored = np.array([[2**24, 2**24 + 1], [2**24 + 2, 2**24 + 3]], np.uint32)
    assert _shown(stored).tolist() == [[0, 85], [170, 255]]


COLOURS = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)


@pytest.mark.parametrize("planar", [0, 1])
def test_rgb_is_read_by_pixel_and_by_plane(planar):
    stored = COLOURS if planar == 0 else COLOURS.transpose(2, 0, 1)
    dataset = _dataset(COLOURS, PlanarConfiguration=planar)
    dataset.PixelData = stored.tobytes()
    assert np.array_equal(decode_dicom(_bytes(dataset)), COLOURS)


def test_rgb_of_16_bits_is_brought_to_8():
    _close(_shown(COLOURS.astype(np.uint16) * 16, bits=12), COLOURS * (16 * 255 / 4095))


def test_rgb_of_8_bits_in_16_is_read():
    assert np.array_equal(_shown(COLOURS.astype(np.uint16), bits=8), COLOURS)


def _ybr(colours):
    """ITU-R BT.601 at full range, PS3.3 C.7.6.3.1.2."""
    r, g, b = (colours[..., i].astype(float) for i in range(3))
    y = 0.299 * r + 0.587 * g + 0.114 * b
    cb = -0.168736 * r - 0.331264 * g + 0.5 * b + 128
    cr = 0.5 * r - 0.418688 * g - 0.081312 * b + 128
    return np.clip(np.rint(np.stack([y, cb, cr], -1)), 0, 255).astype(np.uint8)


def test_ybr_full_becomes_rgb():
    found = _shown(_ybr(COLOURS), PhotometricInterpretation="YBR_FULL")
    # Rounding of Cb and Cr is multiplied by up to 1.772.
    _close(found, COLOURS.astype(float), 2)


def test_ybr_full_422_becomes_rgb():
    pairs = COLOURS[:, ::2].repeat(2, axis=1)
    ybr = _ybr(pairs)
    dataset = _dataset(COLOURS, PhotometricInterpretation="YBR_FULL_422")
    packed = np.stack([ybr[:, ::2, 0], ybr[:, 1::2, 0], ybr[:, ::2, 1], ybr[:, ::2, 2]], -1)
    dataset.PixelData = packed.tobytes()
    _close(decode_dicom(_bytes(dataset)), pairs.astype(float), 2)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("first", [0, 3])
def test_a_palette_gives_its_colours(bits, first):
    rng = np.random.default_rng(1)
    palette = rng.integers(0, 2**bits, (5, 3))
    stored = np.array([[0, 3, 4], [5, 7, 200]], np.uint8)
    elements = {}
    for channel, name in enumerate(("Red", "Green", "Blue")):
        entries = palette[:, channel].astype(f"<u{bits // 8}").tobytes()
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [5, first, bits]
        elements[f"{name}PaletteColorLookupTableData"] = entries + bytes(len(entries) % 2)
    found = _shown(stored, PhotometricInterpretation="PALETTE COLOR", **elements)
    at = np.clip(stored.astype(int) - first, 0, 4)
    _close(found, palette[at] * 255 / (2**bits - 1))


def test_a_palette_of_more_than_256_entries_of_8_bits_is_not_cut_off():
    stored = np.array([[0, 255], [256, 299]], np.uint16)
    entries = (np.arange(300) % 251).astype(np.uint8)
    elements = {}
    for name in ("Red", "Green", "Blue"):
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [300, 0, 8]
        elements[f"{name}PaletteColorLookupTableData"] = entries.tobytes()
    found = _shown(stored, PhotometricInterpretation="PALETTE COLOR", **elements)
    assert found[..., 0].tolist() == [[0, 4], [5, 48]]


def test_a_palette_that_is_missing_says_so():
    with pytest.raises(ImageError, match="no palette"):
        _shown(np.zeros((2, 2), np.uint8), PhotometricInterpretation="PALETTE COLOR")


@pytest.mark.parametrize(
    "syntax",
    [
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        DeflatedExplicitVRLittleEndian,
        RLELossless,
        JPEG2000Lossless,
    ],
)
@pytest.mark.parametrize("frames", [1, 3])
def test_the_first_frame_is_read_in_every_syntax(syntax, frames):
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 4096, (frames, 40, 50)).astype(np.uint16)
    window = {"WindowCenter": 2000, "WindowWidth": 3000}
    count = {"NumberOfFrames": frames} if frames > 1 else {}
    dataset = _dataset(stored if frames > 1 else stored[0], bits=12, **count, **window)
    data = _bytes(dataset, ExplicitVRLittleEndian if syntax.is_encapsulated else syntax)
    if syntax.is_encapsulated:
        whole = pydicom.dcmread(io.BytesIO(data))
        whole.compress(syntax)
        buffer = io.BytesIO()
        whole.save_as(buffer)
        data = buffer.getvalue()
    _close(decode_dicom(data), np.array([[_linear(x, 2000, 3000) for x in r] for r in stored[0]]))


def test_only_the_first_frame_is_decoded():
    """The second is damaged, which does not matter."""
    frames = [np.random.default_rng(s).integers(0, 256, (40, 50)).astype(np.uint8) for s in (0, 1)]
    data = _bytes(_dataset(np.stack(frames), NumberOfFrames=2))
    whole = pydicom.dcmread(io.BytesIO(data))
    whole.compress(JPEG2000Lossless)
    first = get_frame(whole.PixelData, 0, number_of_frames=2)
    for has_table in (True, False):
        whole.PixelData = encapsulate([first, b"\xff\x4f\0\0"], has_bot=has_table)
        buffer = io.BytesIO()
        whole.save_as(buffer)
        _close(decode_dicom(buffer.getvalue()), _stretched(frames[0]))


def _stretched(values):
    low, high = int(values.min()), int(values.max())
    return (values.astype(float) - low) * 255 / (high - low)


MR = [
    "MR_small_RLE.dcm",
    "MR_small_jp2klossless.dcm",
    "MR_small_jpeg_ls_lossless.dcm",
    "MR_small_bigendian.dcm",
    "MR_small_expb.dcm",
    "MR_small_implicit.dcm",
    "MR_small_padded.dcm",
]


@pytest.mark.parametrize("name", MR)
def test_losslessly_compressed_mr_images_are_as_the_uncompressed_one(name):
    assert np.array_equal(decode_dicom(_bundled(name)), decode_dicom(_bundled("MR_small.dcm")))


# Ten bars of ten rows, as published with the files.
BARS = [
    (255, 0, 0),
    (255, 128, 128),
    (0, 255, 0),
    (128, 255, 128),
    (0, 0, 255),
    (128, 128, 255),
    (0, 0, 0),
    (64, 64, 64),
    (192, 192, 192),
    (255, 255, 255),
]


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("SC_rgb_dcmtk_+eb+cr.dcm", 0),
        ("SC_rgb_dcmtk_+eb+cy+n1.dcm", 5),
        ("SC_rgb_dcmtk_+eb+cy+n2.dcm", 5),
        ("SC_rgb_dcmtk_+eb+cy+np.dcm", 5),
        ("SC_rgb_dcmtk_+eb+cy+s2.dcm", 5),
        ("SC_rgb_dcmtk_+eb+cy+s4.dcm", 5),
        ("SC_rgb_gdcm_KY.dcm", 0),
        ("SC_rgb_jls_lossy_line.dcm", 3),
        ("SC_rgb_jls_lossy_sample.dcm", 3),
        ("SC_rgb_jpeg_dcmtk.dcm", 5),
        ("SC_rgb_jpeg_gdcm.dcm", 0),
        ("SC_rgb_jpeg_lossy_gdcm.dcm", 2),
        ("SC_rgb_rle.dcm", 0),
        ("SC_rgb_rle_2frame.dcm", 0),
        ("SC_rgb_rle_16bit.dcm", 0),
        ("SC_rgb_rle_16bit_2frame.dcm", 0),
        ("SC_rgb_rle_32bit.dcm", 0),
        ("SC_ybr_full_422_uncompressed.dcm", 5),
    ],
)
def test_colour_bars_have_their_colours_in_every_syntax(name, tolerance):
    found = decode_dicom(_bundled(name))
    assert found.shape == (100, 100, 3)
    expected = np.array(BARS, float)[:, None].repeat(100, 1)
    _close(found[5::10].astype(float), expected, tolerance)


def test_jpeg_in_rgb_is_not_turned_again():
    small, jpeg = (_bundled(f"SC_rgb_small_odd{end}.dcm") for end in ("", "_jpeg"))
    _close(decode_dicom(jpeg), decode_dicom(small).astype(float), 8)
    big = decode_dicom(_bundled("SC_rgb_small_odd_big_endian.dcm"))
    assert np.array_equal(decode_dicom(small), big)


def test_a_jpeg_of_12_bits_is_read():
    found = decode_dicom(_bundled("JPGExtended.dcm"))
    assert found.shape == (1024, 256)
    # The same bone scan, in another compression.
    other = decode_dicom(_bundled("JPEG2000.dcm"))
    assert np.corrcoef(found.ravel(), other.ravel())[0, 1] > 0.9


def test_the_bundled_ct_is_as_its_values_say():
    """Its first value is 175 - 1024, the least -896, the greatest 1167 in Hounsfield's units."""
    found = decode_dicom(_bundled("CT_small.dcm"))
    assert found.shape == (128, 128)
    assert found[0, 0] == round((175 - 1024 + 896) * 255 / (1167 + 896))
    assert (found.min(), found.max()) == (0, 255)
    # A trunk in air: both are there, and the middle is brighter than the edge.
    assert 60 < found.mean() < 140
    assert found[40:90, 40:90].mean() > found[:8].mean() + 50


def test_the_bundled_mr_is_windowed_as_it_says():
    """Its window is 1600 wide around 600, its first value 905, its greatest 4000."""
    found = decode_dicom(_bundled("MR_small.dcm"))
    assert found.shape == (64, 64)
    assert found[0, 0] == round(_linear(905, 600, 1600))
    assert found.max() == 255
    assert len(np.unique(found)) > 100


def test_decode_gives_rgb_of_both_kinds():
    grey = decode(_bundled("CT_small.dcm"))
    assert (grey.mode, grey.size) == ("RGB", (128, 128))
    assert np.array_equal(np.asarray(grey)[..., 0], decode_dicom(_bundled("CT_small.dcm")))
    colour = decode(_bundled("examples_palette.dcm"))
    assert (colour.mode, colour.size) == ("RGB", (800, 350))
    assert (
        np.asarray(colour)[0, 0].tolist()
        == decode_dicom(_bundled("examples_palette.dcm"))[0, 0].tolist()
    )


def test_pixels_that_are_not_square_stay_as_they_are():
    assert _shown(COLOURS[..., 0], PixelAspectRatio=[2, 1]).shape == COLOURS.shape[:2]
    assert _shown(COLOURS[..., 0], PixelSpacing=[2, 1]).shape == COLOURS.shape[:2]


@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]
)
def test_a_data_set_without_the_head_of_a_file_is_read(syntax):
    stored = np.array([[0, 1], [2, 3]], np.uint16)
    if syntax == ExplicitVRBigEndian:
        stored = stored.astype(">u2")
    dataset = _dataset(stored)
    buffer = io.BytesIO()
    implicit = syntax == ImplicitVRLittleEndian
    pydicom.dcmwrite(
        buffer, dataset, implicit_vr=implicit, little_endian=syntax != ExplicitVRBigEndian
    )
    data = buffer.getvalue()
    assert data[128:132] != b"DICM"
    assert is_dicom(data)
    assert decode_dicom(data).tolist() == [[0, 85], [170, 255]]
    # And with group 2, but without the preamble.
    if syntax != ExplicitVRBigEndian:
        assert decode_dicom(_bytes(_dataset(stored), syntax)[132:]).tolist() == [
            [0, 85],
            [170, 255],
        ]


@pytest.mark.parametrize(
    "data", [b"", b"\x08", b"\xff\xd8\xff\xe0", bytes(200), b"\x08\0\x16\x54ab"]
)
def test_other_bytes_are_no_dicom(data):
    assert not is_dicom(data)


def test_a_file_without_pixels_says_so():
    dataset = _dataset(np.zeros((2, 2), np.uint8))
    del dataset.PixelData
    with pytest.raises(ImageError, match="no pixel data"):
        decode_dicom(_bytes(dataset))
    with pytest.raises(ImageError, match="no pixel data"):
        decode(_bundled("reportsi.dcm"))


def test_a_file_without_a_size_is_an_image_error():
    dataset = _dataset(np.zeros((2, 2), np.uint8))
    del dataset.Rows
    with pytest.raises(ImageError, match="Rows"):
        decode_dicom(_bytes(dataset))


def test_truncated_pixels_are_an_error():
    with pytest.raises(ImageError, match="less than expected"):
        decode(_bundled("MR_truncated.dcm"))


@pytest.mark.parametrize("name", ["MR_small_jpeg_ls_lossless.dcm", "JPGExtended.dcm"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_truncated_frame_is_an_error(name, share):
    dataset = pydicom.dcmread(io.BytesIO(_bundled(name)))
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    dataset.PixelData = encapsulate([frame[: int(len(frame) * share)]])
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    with pytest.raises(ImageError, match="truncated"):
        decode_dicom(buffer.getvalue())


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless])
def test_a_huge_size_is_refused_before_room_is_made_for_it(syntax):
    dataset = _dataset(np.zeros((2, 2), np.uint8))
    dataset.Rows = dataset.Columns = 60000
    if syntax.is_encapsulated:
        dataset.PixelData = encapsulate([bytes(100)])
        dataset["PixelData"].is_undefined_length = True
    with pytest.raises(ImageError, match="60000 x 60000"):
        decode_dicom(_bytes(dataset, syntax))


def test_the_limit_is_on_the_pixels_of_a_frame(monkeypatch):
    data = _bytes(_dataset(COLOURS))
    monkeypatch.setattr(module, "MOST_PIXELS", 47)
    with pytest.raises(ImageError, match="8 x 6"):
        decode_dicom(data)
    monkeypatch.setattr(module, "MOST_PIXELS", 48)
    assert decode_dicom(data).shape == (6, 8, 3)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("JPEGLSNearLossless_08.dcm", 7),
        ("JPGExtended.dcm", 7),
        ("SC_rgb_jpeg_gdcm.dcm", None),
        ("JPEG2000.dcm", 14),
    ],
)
def test_a_frame_that_contradicts_its_file_is_refused(name, at):
    """Some decoders never end with a height of 0, or take all memory for a large one."""
    dataset = pydicom.dcmread(io.BytesIO(_bundled(name)))
    frame = bytearray(get_frame(dataset.PixelData, 0, number_of_frames=1))
    at = frame.index(b"\xff\xc3") + 5 if at is None else at
    for height in (b"\0\0", b"\x60\x60"):
        frame[at : at + 2] = height
        dataset.PixelData = encapsulate([bytes(frame)])
        buffer = io.BytesIO()
        dataset.save_as(buffer)
        with pytest.raises(ImageError, match="compressed frame"):
            decode_dicom(buffer.getvalue())


def test_deflated_data_cannot_fill_the_memory(monkeypatch):
    from medfast.data import dicom

    whole = _bytes(_dataset(np.zeros((200, 200), np.uint8)), DeflatedExplicitVRLittleEndian)
    assert decode_dicom(whole).shape == (200, 200)
    monkeypatch.setattr(dicom, "_MOST_INFLATED", 30_000)
    with pytest.raises(ImageError, match="deflated"):
        decode_dicom(whole)


def test_deflated_data_that_are_cut_off_are_an_error():
    whole = _bytes(_dataset(COLOURS), DeflatedExplicitVRLittleEndian)
    with pytest.raises(ImageError, match=r"deflated|zlib"):
        decode_dicom(whole[:-40])


def test_a_syntax_that_nothing_decodes_is_named():
    dataset = _dataset(np.zeros((2, 2), np.uint8))
    dataset.PixelData = encapsulate([bytes(100)])
    dataset["PixelData"].is_undefined_length = True
    with pytest.raises(ImageError, match="MPEG"):
        decode_dicom(_bytes(dataset, pydicom.uid.UID("1.2.840.10008.1.2.4.102")))


@pytest.mark.parametrize(
    ("missing", "name", "reason"),
    [
        ("pydicom", "CT_small.dcm", "pip install pydicom"),
        ("pylibjpeg", "MR_small_jpeg_ls_lossless.dcm", "pylibjpeg-libjpeg"),
        ("pylibjpeg", "JPGExtended.dcm", "pylibjpeg-libjpeg"),
        ("pylibjpeg", "MR_small_jp2klossless.dcm", None),
        ("pylibjpeg", "SC_rgb_jpeg_dcmtk.dcm", None),
        ("pylibjpeg", "MR_small_RLE.dcm", None),
    ],
)
def test_a_missing_package_is_named_only_where_it_is_needed(missing, name, reason):
    code = (
        "import sys\n"
        f"sys.modules[{missing!r}] = None\n"
        "from medfast.data.decode import ImageError, decode\n"
        "try: print(decode(sys.stdin.buffer.read()).mode)\n"
        "except ImageError as error: print(error)\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], input=_bundled(name), capture_output=True, check=True
    ).stdout.decode()
    assert (reason or "RGB") in shown


def test_damaged_files_are_quiet(capfd):
    broken = _bundled("MR_small.dcm")[:-900], _bundled("JPEG2000.dcm")[:-300], _bundled("badVR.dcm")
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for data in broken:
                with pytest.raises(ImageError):
                    decode(data)
    finally:
        logging.getLogger().removeHandler(handler)
    assert caught == []
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_sequences_within_sequences_without_end_are_an_image_error():
    """Written by hand, as pydicom itself would not get to the end of it."""
    data = _bytes(_dataset(COLOURS))
    at = data.index(b"\x28\0\x02\0US")
    nest = b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\0\xe0\xff\xff\xff\xff"
    # Where the stack ends within a read, pydicom takes that for the end of the file.
    with pytest.raises(ImageError, match=r"Recursion|No tag to read"):
        decode(data[:at] + 5000 * nest + data[at:])


def test_jpeg_baseline_of_pillow_is_read():
    from PIL import Image

    grey = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "JPEG", quality=100)
    dataset = _dataset(grey, WindowCenter=128, WindowWidth=256)
    dataset.PixelData = encapsulate([buffer.getvalue()])
    dataset["PixelData"].is_undefined_length = True
    _close(decode_dicom(_bytes(dataset, JPEGBaseline8Bit)), grey.astype(float), 3)


def test_nearly_lossless_jpeg_ls_of_16_bits_is_read():
    found = decode_dicom(_bundled("JPEGLSNearLossless_16.dcm"))
    assert found.shape == (50, 10)
    assert len(np.unique(found)) > 5
