import dataclasses
import io
import random
import struct
import threading
import time
import warnings

import numpy as np
import pytest
from PIL import Image

from medfast.data import decode as module
from medfast.data.decode import MOST_PIXELS, ImageError, PlainJpeg, decode, plain_jpeg

ORIENTATION = 0x0112


def _encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _pixels(image, format, **options):
    found = decode(_encoded(image, format, **options))
    assert found.mode == "RGB"
    return np.asarray(found)


def _noise(shape, low=0, high=256, dtype=np.uint8):
    return np.random.default_rng(0).integers(low, high, shape).astype(dtype)


def _ramp(mode="RGB"):
    """Grey from 0 on the left to 255 on the right."""
    ramp = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
    return Image.fromarray(ramp).convert("RGB").convert(mode)


def _pillow_reads(data):
    try:
        Image.open(io.BytesIO(data)).load()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("format", "mode"),
    [
        *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *(("JPEG", mode) for mode in ("L", "RGB", "CMYK")),
        *(("TIFF", mode) for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr")),
        *(("JPEG2000", mode) for mode in ("L", "LA", "RGB", "RGBA")),
        *(("GIF", mode) for mode in ("L", "P")),
        *(("BMP", mode) for mode in ("1", "L", "P", "RGB")),
        *(("WEBP", mode) for mode in ("RGB", "RGBA")),
    ],
)
def test_every_mode_becomes_rgb(format, mode):
    image = _ramp(mode)
    if (format, mode) == ("TIFF", "YCbCr") and not _pillow_reads(_encoded(image, format)):
        pytest.skip("this Pillow does not read the raw YCbCr TIFF that it writes")
    found = _pixels(image, format)
    assert found.shape == (16, 16, 3)
    assert found[:, 0].max() < 20
    assert found[:, -1].min() > 235


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "WEBP", "JPEG2000"])
def test_lossless_colours_are_exact(format):
    colours = _noise((20, 30, 3))
    options = {"lossless": True} if format == "WEBP" else {}
    assert np.array_equal(_pixels(Image.fromarray(colours), format, **options), colours)


def test_a_progressive_jpeg_is_read_as_the_baseline_one():
    image = _ramp()
    assert np.array_equal(
        _pixels(image, "JPEG", progressive=True, quality=95), _pixels(image, "JPEG", quality=95)
    )


def _cmyk(transform):
    """Red as Pillow stores it, inverted as Adobe does, with another name for what is stored."""
    data = _encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG", quality=100)
    at = data.index(b"Adobe") + 11
    assert data[at] == 0
    return data[:at] + bytes([transform]) + data[at + 1 :]


def test_inverted_cmyk_of_adobe_keeps_its_colours():
    assert np.allclose(np.asarray(decode(_cmyk(0))), (255, 0, 0), atol=4)


def test_ycck_of_adobe_is_turned_into_its_colours():
    """Stored are 255, 0, 0, 255: Y, Cb, Cr by ITU-R BT.601 of what inverted ink leaves out."""
    y, cb, cr = 255, 0 - 128, 0 - 128
    rgb = (y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb)
    assert np.allclose(np.asarray(decode(_cmyk(2))), 255 - np.clip(rgb, 0, 255), atol=4)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_upright(format, orientation):
    """Marked corner by corner: what the orientation says is top left ends up there."""
    upright = np.zeros((24, 40, 3), np.uint8)
    upright[:12, :20] = (250, 10, 10)
    upright[:12, 20:] = (10, 250, 10)
    upright[12:, :20] = (10, 10, 250)
    # As a camera stores it: the inverse of what EXIF asks a viewer to do.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    image = Image.fromarray(np.ascontiguousarray(stored[orientation]))
    found = _pixels(image, format, exif=exif, **options.get(format, {}))
    assert found.shape == upright.shape
    assert np.abs(found[6::12, 10::20].astype(int) - upright[6::12, 10::20]).max() < 12


def test_a_damaged_orientation_leaves_the_image_as_it_is():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    good = exif.tobytes()
    for bad in (good[:14], good[:10] + b"\xff\xff\xff\xff" + good[14:], b"Exif\0\0XX", b"Exif\0\0"):
        assert decode(_encoded(_ramp(), "JPEG", exif=bad)).size == (16, 16)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG2000"])
def test_grey_of_16_bits_is_stretched(format):
    values = _noise((20, 30), 300, 4096, np.uint16)  # 12 bits, as scanners give
    values[0, :2] = 300, 4095
    found = _pixels(Image.fromarray(values), format)
    expected = (values.astype(float) - 300) * 255 / (4095 - 300)
    assert np.abs(found - expected[..., None]).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_tiff_of_either_byte_order_is_stretched(order):
    values = np.array([[0, 1000], [2000, 4000]], order + "u2")
    tags = [(256, 4, 2), (257, 4, 2), (258, 3, 16), (259, 3, 1), (262, 3, 1)]
    tags += [(273, 4, 8), (277, 3, 1), (278, 4, 2), (279, 4, 8)]
    data = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 16)
    data += values.tobytes() + struct.pack(order + "H", len(tags))
    for tag, kind, value in tags:
        packed = struct.pack(order + ("H2x" if kind == 3 else "I"), value)
        data += struct.pack(order + "HHI", tag, kind, 1) + packed
    found = np.asarray(decode(data + bytes(4)))
    assert found[..., 0].tolist() == [[0, 64], [128, 255]]


def test_16_bit_colour_keeps_its_colours():
    """Pillow writes none, so the PNG is made by hand."""
    import zlib

    values = _noise((4, 5, 3), 0, 65536, np.uint16)

    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    found = np.asarray(decode(data)).astype(float)
    assert np.abs(found - values / 257.0).max() <= 1


def test_float_grey_is_stretched_over_its_finite_values():
    values = np.array([[-1.5, 0.0, 2.5], [np.nan, np.inf, -np.inf]], np.float32)
    found = _pixels(Image.fromarray(values), "TIFF")
    assert found[..., 0].tolist() == [[0, 96, 255], [0, 255, 0]]


def test_the_whole_range_of_floats_does_not_overflow():
    most = np.finfo(np.float32).max
    values = np.array([[-most, 0, most]], np.float32)
    assert _pixels(Image.fromarray(values), "TIFF")[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    "values",
    [
        np.full((3, 4), 900, np.uint16),
        np.full((3, 4), 0.5, np.float32),
        np.full((3, 4), np.nan, np.float32),
        np.full((3, 4), np.inf, np.float32),
        np.full((3, 4), -7, np.int32),
    ],
)
def test_a_constant_image_is_black(values):
    assert not _pixels(Image.fromarray(values), "TIFF").any()


def test_large_images_are_stretched_as_small_ones():
    """More than one piece, and a last one that is not full."""
    values = np.arange(700 * 900, dtype=np.uint32).reshape(700, 900)
    found = module.stretch(values)
    assert np.abs(found - values * (255 / (values.size - 1))).max() <= 0.5 + 1e-6


@pytest.mark.parametrize(
    ("format", "mode"),
    [("PNG", "RGBA"), ("PNG", "LA"), ("TIFF", "RGBA"), ("WEBP", "RGBA"), ("JPEG2000", "RGBA")],
)
def test_what_is_transparent_becomes_white(format, mode):
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0)).convert(mode)
    image.paste((0, 0, 0, 255)[-len(mode) :], (0, 0, 8, 16))
    image.paste((0, 0, 0, 128)[-len(mode) :], (4, 0, 8, 16))
    found = _pixels(image, format, **({"lossless": True} if format == "WEBP" else {}))
    assert (found[:, 12] == 255).all()
    assert (found[:, 1] == 0).all()
    assert np.abs(found[:, 6].astype(int) - 127).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_transparent_entry_of_a_palette_becomes_white(format):
    image = Image.fromarray(np.tile(np.array([0, 1], np.uint8).repeat(8), (16, 1)), "P")
    image.putpalette([200, 0, 0, 0, 0, 200] + [0] * 762)
    found = _pixels(image, format, transparency=0)
    assert (found[:, :8] == 255).all()
    assert (found[:, 8:] == (0, 0, 200)).all()


def test_one_colour_of_a_png_may_be_transparent():
    found = _pixels(_ramp("L"), "PNG", transparency=0)
    assert (found[:, 0] == 255).all()
    assert found[:, 1].max() < 30
    found = _pixels(_ramp("RGB"), "PNG", transparency=(0, 0, 0))
    assert (found[:, 0] == 255).all()


@pytest.mark.parametrize(
    "compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", "lzma"]
)
def test_tiff_is_read_however_it_is_compressed(compression):
    smooth = np.asarray(_ramp().resize((64, 48)))
    found = _pixels(Image.fromarray(smooth), "TIFF", compression=compression)
    assert np.abs(found.astype(int) - smooth).max() <= (8 if compression == "jpeg" else 0)


@pytest.mark.parametrize("format", ["TIFF", "GIF", "WEBP", "PNG"])
def test_the_first_of_several_pages_is_read(format):
    pages = [Image.new("RGB", (16, 16), colour) for colour in ("black", "white", "red")]
    found = _pixels(pages[0], format, save_all=True, append_images=pages[1:])
    assert found.max() < 10


def test_a_codestream_of_jpeg_2000_is_read_as_the_file():
    image = _ramp("L")
    data = _encoded(image, "JPEG2000", no_jp2=True)
    assert data.startswith(b"\xff\x4f\xff\x51")
    assert np.array_equal(np.asarray(decode(data)), _pixels(image, "JPEG2000"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cannot identify the image: it is empty"),
        (b"<html>no such figure</html>", "cannot identify"),
        (bytes(1000), "cannot identify"),
        # Formats that Pillow would read, one of them by starting another program.
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),
        (b"P6 1 1 255 abc", "cannot identify"),
    ],
)
def test_what_is_no_image_says_so(data, reason):
    with pytest.raises(ImageError, match=reason):
        decode(data)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "JPEG2000", "BMP", "WEBP", "GIF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_truncated_file_is_an_error(format, share):
    data = _encoded(Image.fromarray(_noise((60, 80, 3))), format)
    with pytest.raises(ImageError):
        decode(data[: int(len(data) * share)])


def test_rows_that_a_tiff_does_not_hold_are_an_error():
    data = _encoded(Image.fromarray(_noise((60, 80))), "TIFF")
    rows = struct.pack("<HHII", 257, 4, 1, 60)
    assert data.count(rows) == 1
    more = data.replace(rows, struct.pack("<HHII", 257, 4, 1, 90))
    with pytest.raises(ImageError, match="truncated"):
        decode(more)


def _huge(format, side=60000):
    """A small file that declares `side` x `side` pixels."""
    options = {"no_jp2": True} if format == "JPEG2000" else {}
    data = _encoded(Image.new("L", (8, 8)), format, **options)
    if format == "PNG":
        import zlib

        head = data[12:16] + struct.pack(">II", side, side) + data[24:29]
        return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]
    if format == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        return data[:at] + struct.pack(">HH", side, side) + data[at + 4 :]
    if format == "GIF":
        return data[:6] + struct.pack("<HH", side, side) + data[10:]
    if format == "BMP":
        return data[:18] + struct.pack("<ii", side, side) + data[26:]
    at = data.index(b"\xff\x4f\xff\x51") + 8
    return data[:at] + struct.pack(">II", side, side) + data[at + 8 :]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "JPEG2000"])
def test_a_huge_size_is_refused_before_room_is_made_for_it(format):
    start = time.perf_counter()
    with pytest.raises(ImageError, match="60000 x 60000"):
        decode(_huge(format))
    assert time.perf_counter() - start < 1


def test_the_limit_is_on_pixels_and_not_pillows(monkeypatch):
    """Pillow's own limit neither warns below ours nor lets more through."""
    data = _encoded(Image.new("L", (40, 30)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert decode(data).size == (40, 30)
    assert caught == []
    monkeypatch.setattr(module, "MOST_PIXELS", 1199)
    with pytest.raises(ImageError, match="40 x 30"):
        decode(data)
    monkeypatch.setattr(module, "MOST_PIXELS", 1200)
    assert decode(data).size == (40, 30)


def test_warnings_of_pillow_stay_quiet_in_many_threads():
    exif = Image.Exif()
    exif[ORIENTATION] = 1
    exif[0x010F] = "A maker of microscopes"
    bad = _encoded(_ramp(), "JPEG", exif=exif.tobytes()[:-12])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Pillow does warn of it.
        Image.open(io.BytesIO(bad)).getexif()
        assert len(caught) > 0
        del caught[:]
        threads = [
            threading.Thread(target=lambda: [decode(bad) for _ in range(20)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert caught == []


class _Raises:
    def __init__(self, error):
        self.error = error

    def __call__(self, *_):
        raise self.error


@pytest.mark.parametrize(
    "error", [MemoryError(), RecursionError("too deep"), KeyError("x"), SystemError("a\n b" * 200)]
)
def test_whatever_a_decoder_raises_is_an_image_error_of_one_line(monkeypatch, error):
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile", _Raises(error))
    with pytest.raises(ImageError) as caught:
        decode(b"\xff\xd8\xff\xe0")
    reason = str(caught.value)
    assert reason.startswith(type(error).__name__)
    assert len(reason) <= 200
    assert "\n" not in reason


def test_an_interrupt_is_no_image_error(monkeypatch):
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile", _Raises(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        decode(b"\xff\xd8\xff\xe0")


def _exif(orientation):
    exif = Image.Exif()
    exif[0x010F] = "A maker of microscopes"
    exif[ORIENTATION] = orientation
    return exif


@pytest.mark.parametrize(
    ("mode", "options", "components"),
    [
        ("L", {}, 1),
        ("RGB", {}, 3),
        ("RGB", {"progressive": True}, 3),
        ("RGB", {"subsampling": 0, "dpi": (72, 72), "comment": b"a comment"}, 3),
        ("RGB", {"icc_profile": bytes(100_000)}, 3),
        ("RGB", {"exif": _exif(1)}, 3),
        ("L", {"exif": _exif(1)}, 1),
    ],
)
def test_a_plain_jpeg_is_known_by_its_header(mode, options, components):
    data = _encoded(Image.new(mode, (50, 30)), "JPEG", **options)
    assert plain_jpeg(data) == PlainJpeg(50, 30, components)
    assert plain_jpeg(data + bytes(40)) == PlainJpeg(50, 30, components)
    assert decode(data).size == (50, 30)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_jpeg_that_lies_on_its_side_is_not_plain(orientation):
    exif = _exif(orientation)
    data = _encoded(Image.new("RGB", (50, 30)), "JPEG", exif=exif)
    assert plain_jpeg(data) is None
    exif.endian = ">"
    assert plain_jpeg(_encoded(Image.new("RGB", (50, 30)), "JPEG", exif=exif)) is None


def _jpeg(**changes):
    """A JPEG file with the bytes of its frame header changed."""
    data = bytearray(_encoded(Image.new("RGB", (50, 30)), "JPEG"))
    at = data.index(b"\xff\xc0")
    for name, value in changes.items():
        offset, layout = {
            "marker": (1, "B"),
            "precision": (4, "B"),
            "height": (5, ">H"),
            "width": (7, ">H"),
        }[name]
        struct.pack_into(layout, data, at + offset, value)
    return bytes(data)


@pytest.mark.parametrize(
    "changes",
    [
        {"marker": 0xC3},
        {"marker": 0xC9},
        {"precision": 12},
        {"height": 0},
        {"width": 0},
        {"width": 65535, "height": 65535},
    ],
)
def test_a_jpeg_of_another_kind_is_not_plain(changes):
    assert plain_jpeg(_jpeg()) is not None
    assert plain_jpeg(_jpeg(**changes)) is None


def test_the_largest_plain_jpeg_has_most_pixels():
    assert MOST_PIXELS == 2**27
    assert plain_jpeg(_jpeg(width=2**13, height=2**14)) == PlainJpeg(2**13, 2**14, 3)
    assert plain_jpeg(_jpeg(width=2**13 + 1, height=2**14)) is None


def test_a_jpeg_of_other_colours_is_not_plain():
    assert plain_jpeg(_encoded(Image.new("CMYK", (50, 30)), "JPEG")) is None
    # Stored as RGB: Pillow writes it with Adobe's marker or with the names of the components.
    kept = _encoded(Image.new("RGB", (50, 30)), "JPEG", keep_rgb=True)
    assert plain_jpeg(kept) is None
    ycc = _jpeg()
    adobe = b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0"
    assert plain_jpeg(ycc[:2] + adobe + b"\x00" + ycc[2:]) is None
    assert plain_jpeg(ycc[:2] + adobe + b"\x01" + ycc[2:]) == PlainJpeg(50, 30, 3)


def test_a_jpeg_without_its_end_is_not_plain():
    data = _jpeg()
    assert plain_jpeg(data[:-2]) is None
    assert plain_jpeg(data[:-1]) is None
    assert plain_jpeg(data[: len(data) // 2]) is None
    assert plain_jpeg(data + b"\0\1") is None
    # The end of the thumbnail is not that of the image.
    assert plain_jpeg(b"\xff\xd8\xff\xd9") is None


@pytest.mark.parametrize("format", ["PNG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000"])
def test_another_format_is_no_plain_jpeg(format):
    assert plain_jpeg(_encoded(_ramp(), format)) is None


def test_a_plain_jpeg_never_raises():
    whole = [
        _encoded(Image.new("RGB", (50, 30)), "JPEG", exif=_exif(1), icc_profile=bytes(300)),
        _encoded(Image.new("L", (50, 30)), "JPEG", exif=_exif(6)),
    ]
    rng = random.Random(0)
    found = set()
    for _ in range(20_000):
        data = bytearray(rng.choice(whole))
        for _ in range(rng.choice([0, 1, 1, 2, 5, 40])):
            data[rng.randrange(len(data))] = rng.choice([0, 1, 255, rng.randrange(256)])
        if rng.random() < 0.3:
            data = data[: rng.randrange(len(data))]
        if rng.random() < 0.5:
            data += b"\xff\xd9"
        found.add(type(plain_jpeg(bytes(data))))
    for length in range(400):
        found.add(type(plain_jpeg(b"\xff\xd8\xff" + rng.randbytes(length) + b"\xff\xd9")))
    assert found == {PlainJpeg, type(None)}


def test_a_plain_jpeg_is_frozen():
    header = plain_jpeg(_jpeg())
    with pytest.raises(dataclasses.FrozenInstanceError):
        header.width = 1


def test_looking_at_a_header_takes_microseconds():
    """At most 15, in the best of many runs: a busy machine only ever adds."""
    image = Image.fromarray(_noise((600, 800, 3)))
    data = _encoded(image, "JPEG", exif=_exif(1), icc_profile=bytes(3000))
    seconds = []
    for _ in range(200):
        start = time.perf_counter()
        plain_jpeg(data)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 15e-6, min(seconds)
