"""Encoded images to pixels: upright, 8-bit RGB, or an `ImageError` that says why not.

What a file is, its content decides and never its name. `plain_jpeg` finds the files that a faster
decoder may take.
"""

from __future__ import annotations

import importlib
import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

# The largest whole-slide regions and mammograms in use have a quarter of it; at 4 bytes a pixel and
# two copies it is 1 GiB.
MOST_PIXELS = 2**27

_LONGEST_REASON = 200

# What a file starts with, and the class of Pillow that reads it. Pillow's own `Image.open` knows
# many more formats, among them some that start other programs.
_FORMATS = (
    (rb"\xff\xd8\xff", "JpegImagePlugin", "JpegImageFile"),
    (rb"\x89PNG\r\n\x1a\n", "PngImagePlugin", "PngImageFile"),
    (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "TiffImagePlugin", "TiffImageFile"),
    (rb"\0\0\0\x0cjP  \r\n\x87\n|\xffO\xffQ", "Jpeg2KImagePlugin", "Jpeg2KImageFile"),
    (rb"GIF8[79]a", "GifImagePlugin", "GifImageFile"),
    (rb"RIFF.{4}WEBP", "WebPImagePlugin", "WebPImageFile"),
    (rb"BM", "BmpImagePlugin", "BmpImageFile"),
)

# Orientation of EXIF -> what turns the image upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF = b"Exif\0\0"

# Far more than any camera or profile makes; it bounds the walk through a hostile file.
_MOST_SEGMENTS = 4096
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_START_OF_SCAN = 0xDA
# Zeros after the end of a JPEG file, as some archives pad with.
_MOST_PADDING = 4096

# Of the libraries, the modules that warn of what they find in damaged files.
_QUIET = ("ignore", None, Warning, re.compile(r"(PIL|pydicom|libjpeg|openjpeg)\."), 0)


class ImageError(Exception):
    """An image that cannot be used, and why."""


@dataclass(frozen=True)
class PlainJpeg:
    """What the header of a plain JPEG file says.

    Attributes:
        width: In pixels.
        height: In pixels.
        components: 1 for grey, 3 for YCbCr.
    """

    width: int
    height: int
    components: int


class JpegFrame(NamedTuple):
    """The frame header of any JPEG or JPEG-LS data.

    Attributes:
        marker: Which process coded it: 0xC0 baseline, 0xC2 progressive, 0xF7 JPEG-LS, ...
        precision: Bits of a sample.
        height: In pixels; 0 if it comes after the first scan.
        width: In pixels.
        ids: One byte for each component.
    """

    marker: int
    precision: int
    height: int
    width: int
    ids: bytes


@contextmanager
def damage_as_image_error() -> Iterator[None]:
    """Raise whatever a decoder raises as an `ImageError` of one short line; hush its warnings."""
    # `warnings.catch_warnings` swaps a list that all threads share. A filter that stays is safe,
    # and has to be looked for each time: others add theirs before it, or take it away.
    if not warnings.filters or warnings.filters[0] != _QUIET:
        warnings.filterwarnings("ignore", module=_QUIET[3].pattern)
    try:
        yield
    except ImageError:
        raise
    # Codecs raise what they like, memory and recursion errors included, if the file is damaged.
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        if len(words) > _LONGEST_REASON:
            words = words[: _LONGEST_REASON - 3] + "..."
        raise ImageError(words) from None


def decode(data: bytes) -> Image.Image:
    """Return an encoded image, upright, as 8-bit RGB.

    Reads JPEG, PNG, TIFF, JPEG 2000, GIF, WebP, BMP and, see `decode_dicom`, DICOM; of several
    pages or frames the first. What is transparent becomes white, the paper that figures are drawn
    on. Grey of more than 8 bits is stretched from its least to its greatest value, as no window is
    known. Colour profiles are not applied.

    Raises:
        ImageError: it is damaged, no image, or has more than `MOST_PIXELS`.
    """
    from medfast.data.dicom import decode_dicom, is_dicom

    with damage_as_image_error():
        if is_dicom(data):
            return Image.fromarray(decode_dicom(data)).convert("RGB")
        with _open(data) as image:
            check_size(*image.size)
            _check_rows(image)
            image.load()
            return _turned(_rgb(image), image.info.get("exif"))


def _open(data: bytes) -> ImageFile:
    for start, module, name in _FORMATS:
        if re.match(start, data, re.DOTALL):
            # Not by `Image.open`: it warns of sizes that are allowed here.
            reader = getattr(importlib.import_module(f"PIL.{module}"), name)
            return reader(io.BytesIO(data))
    what = f"it starts with {data[:8]!r}" if data else "it is empty"
    raise ImageError(f"cannot identify the image: {what}")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        # Pillow's conversion cuts 16-bit values off at 255.
        return Image.fromarray(stretch(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _turned(image: Image.Image, exif: bytes | None) -> Image.Image:
    turn = _TURNS.get(_orientation(exif)) if exif else None
    return image if turn is None else image.transpose(turn)


def _check_rows(image: ImageFile) -> None:
    """Raise ImageError if a TIFF file lists no data for its last rows, which Pillow lets pass."""
    if isinstance(image, TiffImageFile):
        declared = image.tag_v2[257]
        held = max((tile[1][3] for tile in image.tile if tile[1]), default=0)
        if held < declared:
            raise ImageError(f"truncated: it declares {declared} rows and holds {held}")


def check_size(width: int, height: int) -> None:
    """Raise ImageError unless the size, as a header declares it, is one to make room for."""
    if not (width > 0 and height > 0 and width * height <= MOST_PIXELS):
        raise ImageError(
            f"it declares {width} x {height} pixels; they must be 1 to {MOST_PIXELS} together"
        )


def stretch(values: np.ndarray, low: float | None = None, high: float | None = None) -> np.ndarray:
    """Return values scaled to 0 to 255, uint8.

    Args:
        values: Any real numbers; what is not finite becomes the nearest end, or 0.
        low: What becomes 0; None for the least finite value.
        high: What becomes 255; None for the greatest finite value. If it is `low`, all become 0.
    """
    if low is None or high is None:
        real = values if values.dtype.kind in "bui" else values[np.isfinite(values)]
        low, high = (float(real.min()), float(real.max())) if real.size else (0.0, 0.0)
    shown = np.zeros(values.shape, np.uint8)
    if high > low:
        # Piece by piece: a copy in float64 is up to eight times the image.
        for piece, out in zip(_pieces(values), _pieces(shown), strict=True):
            with np.errstate(all="ignore"):
                # Halved, as the distance of two finite numbers need not be finite.
                halved = piece.astype(np.float64) / 2 - low / 2
                out[...] = to_bytes(halved / np.float64(high / 2 - low / 2) * 255)
    return shown


def _pieces(rows: np.ndarray) -> Iterator[np.ndarray]:
    step = max(1, 2**18 // max(1, rows[0].size)) if len(rows) else 1
    return (rows[top : top + step] for top in range(0, len(rows), step))


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Return values, rounded and cut off at 0 and 255, as uint8. Floats are changed in place."""
    values = np.nan_to_num(values, copy=False, nan=0.0, posinf=255.0, neginf=0.0)
    return np.rint(np.clip(values, 0, 255, out=values), out=values).astype(np.uint8)


def plain_jpeg(data: bytes) -> PlainJpeg | None:
    """Return the header of a JPEG file that any decoder reads in the same way, else None.

    Such a file is whole, has 8 bits, is baseline or progressive, grey or YCbCr, stands upright, and
    has at most `MOST_PIXELS`. Never raises; costs a few microseconds.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    if not data.endswith(b"\xff\xd9") and not (
        data[-_MOST_PADDING:].rstrip(b"\0").endswith(b"\xff\xd9")
    ):
        return None
    frame: JpegFrame | None = None
    jfif = exif = False
    for marker, start, end in _segments(data):
        if marker in _START_OF_FRAME:
            if frame or marker > 0xC2:
                return None
            frame = _frame(marker, data[start:end])
        elif marker == 0xE0:
            jfif = jfif or data.startswith(b"JFIF\0", start)
        elif marker == 0xE1 and data.startswith(_EXIF, start):
            # The second of two may go on with the first one's data.
            if exif or _orientation(data[start:end]) != 1:
                return None
            exif = True
        elif marker == 0xEE and data.startswith(b"Adobe", start):
            # 0 is for RGB and CMYK, 1 for YCbCr.
            if data[start + 11 : start + 12] != b"\x01":
                return None
        elif marker == _START_OF_SCAN:
            break
    else:
        return None
    if frame is None or frame.precision != 8 or len(frame.ids) not in (1, 3):
        return None
    # So libjpeg tells RGB where nothing else does.
    if frame.ids == b"RGB" and not jfif:
        return None
    if not 0 < frame.width * frame.height <= MOST_PIXELS:
        return None
    return PlainJpeg(frame.width, frame.height, len(frame.ids))


def jpeg_frame(data: bytes) -> JpegFrame | None:
    """Return the frame header of JPEG or JPEG-LS data, None if there is none before a scan."""
    for marker, start, end in _segments(data):
        if marker in _START_OF_FRAME or marker == 0xF7:
            return _frame(marker, data[start:end])
    return None


def _frame(marker: int, segment: bytes) -> JpegFrame | None:
    if len(segment) < 6:
        return None
    precision, height, width, components = struct.unpack_from(">BHHB", segment)
    ids = segment[6::3]
    return JpegFrame(marker, precision, height, width, ids) if len(ids) == components else None


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the marker, start and end of the segments up to the first scan, or up to damage."""
    at, size = 2, len(data)
    for _ in range(_MOST_SEGMENTS):
        if at + 4 > size or data[at] != 0xFF:
            return
        marker = data[at + 1]
        if marker == 0xFF:
            # Fill bytes may stand before a marker.
            at += 1
            continue
        end = at + 2 + (data[at + 2] << 8 | data[at + 3])
        if end > size:
            return
        yield marker, at + 4, end
        if marker == _START_OF_SCAN:
            return
        at = end


def _orientation(exif: bytes) -> int:
    """Return the orientation that EXIF data tell; 1, upright, where they are damaged."""
    tiff = exif.removeprefix(_EXIF)
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2], "")
    if not order:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", tiff, at)
            if tag == 0x0112:
                (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), tiff, at + 8)
                return value if value in _TURNS else 1
    except struct.error:
        pass
    return 1
