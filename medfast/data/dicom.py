"""DICOM files to the 8-bit pixels that a viewer shows at first, rescaled and windowed.

The standard is cited by part and section, as in "PS3.3 C.11.2".
"""

from __future__ import annotations

import io
import logging
import math
import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from medfast.data.decode import (
    ImageError,
    check_size,
    damage_as_image_error,
    jpeg_frame,
    stretch,
    to_bytes,
)

if TYPE_CHECKING:
    from pydicom import Dataset

# As much as a file may have: 8 bytes for each of the most pixels.
_MOST_INFLATED = 2**30

_DEFLATED = "1.2.840.10008.1.2.1.99"
_JPEG = tuple(f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70, 80, 81))
_JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
_RLE = "1.2.840.10008.1.2.5"

_DECODERS = "pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"

_CODESTREAM = b"\xff\x4f\xff\x51"


def is_dicom(data: bytes) -> bool:
    """Return whether the bytes are a DICOM file, or a data set that lacks the file's head.

    Without a head it must begin as all data sets of images do, with a small tag of group 2 or 8.
    """
    if data[128:132] == b"DICM":
        return True
    little, big = data[:2] in (b"\x02\0", b"\x08\0"), data[:2] == b"\0\x08"
    return len(data) > 8 and ((little and data[3] == 0) or (big and data[2] == 0))


def decode_dicom(data: bytes) -> np.ndarray:
    """Return the first frame of a DICOM file as a viewer would show it.

    Grey goes through the modality's rescaling or table, then through the first of the file's
    windows or VOI tables at full depth, and MONOCHROME1 is inverted. Without a window the values
    are stretched from the least to the greatest, the padding value apart. Pixels that are not
    square stay as they are stored; overlays are not drawn.

    Returns:
        uint8 [H, W], or [H, W, 3] for colour.

    Raises:
        ImageError: the file is damaged, has no pixels or more than `MOST_PIXELS`, or needs a
            package that is not installed.
    """
    with damage_as_image_error():
        dataset = _read(data)
        values, meaning = _first_frame(dataset)
        if meaning == "PALETTE COLOR":
            return _palette(values, dataset)
        if values.ndim == 3:
            if meaning != "RGB":
                raise ImageError(f"its colours are {meaning}, which cannot be turned into RGB")
            return _full_range(values, int(dataset.BitsStored))
        return _grey(values, dataset, inverted=meaning == "MONOCHROME1")


def _read(data: bytes) -> Dataset:
    try:
        import pydicom
        from pydicom.filereader import read_dataset
    except ModuleNotFoundError as error:
        if error.name != "pydicom":
            raise
        raise ImageError("a DICOM image needs pydicom: pip install pydicom") from None
    # It logs what it also raises, with a traceback, for every damaged file.
    if logging.getLogger("pydicom").isEnabledFor(logging.CRITICAL):
        for name in ("pydicom", "pylibjpeg", "libjpeg", "openjpeg"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)

    stream = io.BytesIO(data)
    if data[128:132] == b"DICM":
        stream.seek(132)
    if data[stream.tell() : stream.tell() + 2] == b"\x02\0":
        head = read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
        if head.get("TransferSyntaxUID") == _DEFLATED:
            # pydicom would inflate it whatever comes out.
            inflated = io.BytesIO(_inflate(data[stream.tell() :]))
            dataset = read_dataset(inflated, False, True)
            dataset.file_meta = pydicom.dataset.FileMetaDataset(head)
            return dataset
    stream.seek(0)
    dataset = pydicom.dcmread(stream, force=True)
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        dataset.file_meta.TransferSyntaxUID = (
            pydicom.uid.ImplicitVRLittleEndian
            if implicit
            else (pydicom.uid.ExplicitVRLittleEndian if little else pydicom.uid.ExplicitVRBigEndian)
        )
    return dataset


def _inflate(data: bytes) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = inflater.decompress(data, _MOST_INFLATED)
    if not inflater.eof:
        raise ImageError(f"its deflated data are cut off, or more than {_MOST_INFLATED} bytes")
    return inflated


def _first_frame(dataset: Dataset) -> tuple[np.ndarray, str]:
    """Return the stored values of the first frame, and what they mean (RGB, MONOCHROME2, ...)."""
    from pydicom.pixels import get_decoder

    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise ImageError("it has no pixel data, or ends within them")
    check_size(int(dataset.Columns), int(dataset.Rows))
    syntax = dataset.file_meta.TransferSyntaxUID
    decoder = get_decoder(syntax)
    plugin = ""
    if syntax.is_encapsulated:
        plugin = _checked_plugin(dataset, syntax)
        if plugin not in decoder.available_plugins:
            raise ImageError(f"{syntax.name} needs a decoder: pip install {_DECODERS}")
    values, properties = decoder.as_array(dataset, index=0, decoding_plugin=plugin)
    return values, str(properties["photometric_interpretation"])


def _checked_plugin(dataset: Dataset, syntax: str) -> str:
    """Return which of pydicom's plugins shall decode the first frame.

    Raises:
        ImageError: the frame's own header contradicts the data set. Decoders believe the former,
            and some of them then take all memory or never end.
    """
    from pydicom.encaps import encapsulate, get_frame

    if syntax == _RLE:
        # pylibjpeg's panics on damaged data.
        return "pydicom"
    frames = int(dataset.get("NumberOfFrames") or 1)
    tables = ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")
    offsets = tuple(dataset[name].value for name in tables if name in dataset)
    frame = get_frame(
        dataset.PixelData,
        0,
        number_of_frames=frames,
        extended_offsets=offsets if len(offsets) == 2 else None,
    )
    declared = (int(dataset.Columns), int(dataset.Rows), int(dataset.SamplesPerPixel))
    if syntax in _JPEG:
        header = jpeg_frame(frame)
        if header is None:
            raise ImageError("its compressed frame has no JPEG header")
        found = (header.width, header.height, len(header.ids))
        eight_bits = header.marker in (0xC0, 0xC1, 0xC2) and header.precision == 8
        plugin = "pillow" if eight_bits else "pylibjpeg"
        if plugin == "pylibjpeg" and b"\xff\xd9" not in frame[-16:]:
            # It makes up what is missing.
            raise ImageError("truncated: its compressed frame has no end")
    else:
        start = frame.find(_CODESTREAM)
        if start < 0 or len(frame) < start + 43:
            raise ImageError("its compressed frame has no JPEG 2000 header")
        x1, y1, x0, y0, *_, components, depth = struct.unpack_from(">8IHB", frame, start + 8)
        found = (x1 - x0, y1 - y0, components)
        # The boxes of the file format do not belong here, and pydicom may loop in damaged ones.
        frame = frame[start:]
        bits = (depth & 0x7F) + 1
        fits = bits <= 8 or (bits <= 16 and components == 1)
        plugin = "pillow" if fits and syntax in _JPEG_2000 else "pylibjpeg"
    if found != declared:
        raise ImageError(
            f"it declares {declared[0]} x {declared[1]} pixels of {declared[2]} samples, its "
            f"compressed frame {found[0]} x {found[1]} of {found[2]}"
        )
    # Only what has been looked at is decoded.
    dataset.PixelData = encapsulate([frame])
    dataset.NumberOfFrames = 1
    for name in tables:
        dataset.pop(name, None)
    return plugin


def _full_range(values: np.ndarray, bits: int) -> np.ndarray:
    """Return unsigned values of so many bits as 8-bit ones."""
    if bits == 8:
        return np.ascontiguousarray(values, np.uint8)
    return to_bytes(values * (255 / (2**bits - 1)))


def _palette(values: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Return the colours of palette entries, PS3.3 C.7.6.3.1.5."""
    colours = []
    for colour in ("Red", "Green", "Blue"):
        name = f"{colour}PaletteColorLookupTable"
        if f"{name}Data" not in dataset:
            raise ImageError("it has no palette, or one in segments, which is not supported")
        table, first = _table(dataset, f"{name}Descriptor", f"{name}Data")
        colours.append(_look_up(values, table, first))
    return np.stack(colours, axis=-1)


def _grey(stored: np.ndarray, dataset: Dataset, inverted: bool) -> np.ndarray:
    values = _modality(stored, dataset)
    shown = _voi(values, dataset)
    if shown is None:
        shown = stretch(values, *_ends(values, stored, dataset))
    return 255 - shown if inverted else shown


def _modality(stored: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Return stored values in the modality's unit, such as Hounsfield's, PS3.3 C.11.1."""
    item = _macro(dataset, "PixelValueTransformationSequence")
    if dataset.get("ModalityLUTSequence"):
        (lut, *_) = dataset.ModalityLUTSequence
        table, first = _table(lut, "LUTDescriptor", "LUTData", dataset, as_bytes=False)
        return _look_up(stored, table, first)
    slope, intercept = _number(item, "RescaleSlope"), _number(item, "RescaleIntercept")
    # float32 holds 16 bits exactly, at half the memory.
    values = stored.astype(np.float32 if stored.dtype.itemsize <= 2 else np.float64)
    with np.errstate(all="ignore"):
        values *= 1.0 if slope is None else slope
        values += 0.0 if intercept is None else intercept
    return values


def _voi(values: np.ndarray, dataset: Dataset) -> np.ndarray | None:
    """Return the values of interest as uint8, PS3.3 C.11.2; None if the file does not say which."""
    item = _macro(dataset, "FrameVOILUTSequence")
    if item.get("VOILUTSequence"):
        (lut, *_) = item.VOILUTSequence
        table, first = _table(lut, "LUTDescriptor", "LUTData", dataset)
        return _look_up(values, table, first)
    center, width = _number(item, "WindowCenter"), _number(item, "WindowWidth")
    function = str(item.get("VOILUTFunction") or "LINEAR").strip().upper()
    if center is None or width is None or width < (1 if function == "LINEAR" else 1e-6):
        return None
    values = values.astype(np.float64 if values.dtype.itemsize > 4 else np.float32)
    with np.errstate(all="ignore"):
        if function == "SIGMOID":
            values -= center
            values *= -4 / width
            return to_bytes(255 / (1 + np.exp(values)))
        if function == "LINEAR":
            center, width = center - 0.5, width - 1
        values -= center
        if width == 0:
            return np.where(values > 0, 255, 0).astype(np.uint8)
        values /= width
        values += 0.5
        values *= 255
    return to_bytes(values)


def _ends(
    values: np.ndarray, stored: np.ndarray, dataset: Dataset
) -> tuple[float | None, float | None]:
    """Return the least and greatest value that is no padding; None for all values'."""
    padding = dataset.get("PixelPaddingValue")
    if padding is None:
        return None, None
    limit = dataset.get("PixelPaddingRangeLimit")
    low, high = sorted((int(padding), int(padding if limit is None else limit)))
    real = values[(stored < low) | (stored > high)]
    return (float(real.min()), float(real.max())) if real.size else (None, None)


def _macro(dataset: Dataset, name: str) -> Dataset:
    """Return the item with the first frame's attributes, which an enhanced image keeps apart."""
    for groups in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        if dataset.get(groups) and dataset[groups][0].get(name):
            return dataset[groups][0][name][0]
    return dataset


def _number(item: Dataset, name: str) -> float | None:
    """Return the first of an element's finite values, None if there is none."""
    value: Any = item.get(name)
    if value is None or value == "":
        return None
    number = float(value if isinstance(value, (int, float, str)) else next(iter(value), math.nan))
    return number if math.isfinite(number) else None


def _table(
    item: Dataset, descriptor: str, data: str, dataset: Dataset | None = None, as_bytes: bool = True
) -> tuple[np.ndarray, int]:
    """Return a look-up table, scaled to uint8 or as it is, and the value of its first entry.

    Args:
        item: What holds the table.
        descriptor: Name of the element with number of entries, first value, bits; PS3.3 C.11.1.1.
        data: Name of the element with the entries.
        dataset: Of the file; None if it is `item`.
        as_bytes: Whether to scale the entries' range to 0 to 255.
    """
    entries, first, bits = (int(value) for value in item[descriptor].value)
    entries = entries or 2**16
    raw = item[data].value
    if isinstance(raw, bytes):
        little = (dataset or item).file_meta.TransferSyntaxUID.is_little_endian
        order = "<u2" if little else ">u2"
        table = np.frombuffer(raw, np.uint8 if len(raw) < 2 * entries else order)
        bits = 8 if table.dtype == np.uint8 else bits
    else:
        table = np.atleast_1d(np.asarray(raw))
    table = table[:entries].astype(np.float32)
    if not (len(table) and 1 <= bits <= 16):
        raise ImageError(f"its look-up table has {len(table)} entries of {bits} bits")
    return to_bytes(table * (255 / (2**bits - 1))) if as_bytes else table, first


def _look_up(values: np.ndarray, table: np.ndarray, first: int) -> np.ndarray:
    if first > 2**15 and values.min(initial=0) < 0:
        # A negative number that is stored as an unsigned one.
        first -= 2**16
    at = np.nan_to_num(np.rint(values.astype(np.float64) - first))
    return table[np.clip(at, 0, len(table) - 1).astype(np.intp)]
