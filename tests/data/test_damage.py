"""Damaged files of every format end in an image or an ImageError, and in nothing else.

The files are damaged and decoded in processes of their own, so that a codec that crashes or never
ends fails a test instead of ending the tests: `python tests/data/test_damage.py GROUP FIRST LAST`.
"""

import functools
import io
import json
import random
import re
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medfast.data.decode import ImageError, PlainJpeg, decode, plain_jpeg

# Together more than 2,000 cases.
CASES = {"jpeg": 700, "pillow": 1400, "dicom": 700, "compressed": 900}
SLOWEST = 5.0
MOST_MEMORY = 2 * 2**30

BUNDLED = {
    "dicom": [
        "CT_small.dcm",
        "MR_small.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_implicit.dcm",
        "ExplVR_BigEnd.dcm",
        "SC_ybr_full_422_uncompressed.dcm",
        "image_dfl.dcm",
        "rtdose_1frame.dcm",
        "liver_1frame.dcm",
    ],
    "compressed": [
        "JPEG2000.dcm",
        "MR_small_jp2klossless.dcm",
        "GDCMJ2K_TextGBR.dcm",
        "693_J2KI.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "JPEGLSNearLossless_08.dcm",
        "SC_rgb_jls_lossy_line.dcm",
        "JPGExtended.dcm",
        "SC_rgb_jpeg_gdcm.dcm",
        "SC_rgb_jpeg_dcmtk.dcm",
        "SC_rgb_small_odd_jpeg.dcm",
        "MR_small_RLE.dcm",
        "SC_rgb_rle_16bit_2frame.dcm",
    ],
}


def _picture(mode):
    y, x = np.mgrid[:90, :120]
    rng = np.random.default_rng(0)
    grey = (x + y + rng.integers(0, 30, x.shape)).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 200)
    if mode == "F":
        return Image.fromarray(grey.astype(np.float32) / 7 - 3)
    colour = Image.fromarray(np.stack([grey, 255 - grey, x.astype(np.uint8)], -1))
    return colour.convert(mode)


def _saved(mode, format, **options):
    buffer = io.BytesIO()
    _picture(mode).save(buffer, format, **options)
    return buffer.getvalue()


def originals(group):
    """Return whole files of a group by name."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "A maker of scanners"
    if group == "jpeg":
        return {
            "grey": _saved("L", "JPEG"),
            "colour": _saved("RGB", "JPEG", exif=exif, dpi=(300, 300)),
            "progressive": _saved("RGB", "JPEG", progressive=True, subsampling=0),
            "cmyk": _saved("CMYK", "JPEG"),
            "profile": _saved("RGB", "JPEG", icc_profile=bytes(5000), comment=b"a" * 500),
        }
    if group == "pillow":
        pages = {"save_all": True, "append_images": [_picture("RGB")]}
        return {
            "png grey": _saved("L", "PNG"),
            "png 16": _saved("I;16", "PNG"),
            "png palette": _saved("P", "PNG", transparency=3),
            "png rgba": _saved("RGBA", "PNG", exif=exif),
            "tiff": _saved("RGB", "TIFF"),
            "tiff float": _saved("F", "TIFF"),
            "tiff lzw": _saved("I;16", "TIFF", compression="tiff_lzw"),
            "tiff deflate": _saved("RGBA", "TIFF", compression="tiff_adobe_deflate"),
            "tiff jpeg": _saved("RGB", "TIFF", compression="jpeg"),
            "tiff fax": _saved("1", "TIFF", compression="group4"),
            "tiff pages": _saved("RGB", "TIFF", **pages),
            "jp2": _saved("RGB", "JPEG2000"),
            "j2k 16": _saved("I;16", "JPEG2000", no_jp2=True),
            "j2k tiles": _saved("L", "JPEG2000", tile_size=(32, 32)),
            "webp": _saved("RGB", "WEBP", exif=exif),
            "webp lossless": _saved("RGBA", "WEBP", lossless=True),
            "webp moving": _saved("RGB", "WEBP", **pages),
            "gif": _saved("P", "GIF", **pages),
            "bmp": _saved("RGB", "BMP"),
            "bmp palette": _saved("P", "BMP"),
        }
    from pydicom.data import get_testdata_file

    return {
        name: Path(get_testdata_file(name, download=False)).read_bytes() for name in BUNDLED[group]
    }


def damaged(files, seed):
    """Return the name of one of the files, and its bytes with a damage that the seed decides."""
    rng = random.Random(seed)
    name = rng.choice(sorted(files))
    data = bytearray(files[name])
    # Of the head, where the declarations are, or of anything.
    size = len(data) if rng.random() < 0.5 else min(len(data), rng.choice([64, 400, 2000]))

    def anything():
        return rng.choice([0, 1, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256)])

    kind = rng.randrange(8)
    if kind == 0:
        data = data[: rng.randrange(len(data))]
    elif kind == 1:
        for _ in range(rng.choice([1, 2, 4, 16, 64])):
            data[rng.randrange(size)] = anything()
    elif kind == 2:
        data[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == 3:
        at, width = rng.randrange(size), rng.choice([2, 4, 8])
        data[at : at + width] = bytes([anything()]) * width
    elif kind == 4:
        at, length = rng.randrange(size), rng.randrange(1, 400)
        data[at : at + length] = bytes(length)
    elif kind == 5:
        other = files[rng.choice(sorted(files))]
        data = data[: rng.randrange(size)] + other[rng.randrange(len(other)) :]
    elif kind == 6:
        start, length = rng.randrange(size), rng.randrange(1, 300)
        if rng.random() < 0.5:
            del data[start : start + length]
        else:
            data[start:start] = data[rng.randrange(len(data)) :][:length]
    else:
        noise = rng.randbytes(rng.choice([0, 1, 3, 7, 50, 131, 132, 140, 3000]))
        data = data[: rng.choice([0, 2, 4, 12, 140])] + noise
    return name, bytes(data)


def run(group, first, last):
    """Decode the cases of a group one after another, and print what came of them as JSON."""
    resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
    files = originals(group)
    decode(files[min(files)])
    warnings.simplefilter("always")
    progress = Path(sys.argv[4]) if len(sys.argv) > 4 else None
    good, slow, wrong, reasons = 0, 0.0, [], set()
    for seed in range(first, last):
        name, data = damaged(files, seed)
        if progress:
            progress.write_text(f"{seed} {name}")
        header = plain_jpeg(data)
        if header is not None and not isinstance(header, PlainJpeg):
            wrong.append(f"{seed} {name}: {header!r}")
        start = time.perf_counter()
        try:
            image = decode(data)
        except ImageError as error:
            reasons.add(str(error))
        except BaseException as error:
            wrong.append(f"{seed} {name}: {error!r}")
        else:
            good += 1
            if image.mode != "RGB" or np.asarray(image).dtype != np.uint8:
                wrong.append(f"{seed} {name}: {image}")
        seconds = time.perf_counter() - start
        slow = max(slow, seconds)
        if seconds > SLOWEST:
            wrong.append(f"{seed} {name}: {seconds:.1f} s")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {
                "good": good,
                "slow": slow,
                "wrong": wrong,
                "reasons": sorted(reasons),
                "memory": memory,
            }
        )
    )


@functools.cache
def outcome(group):
    child = subprocess.run(
        [sys.executable, __file__, group, "0", str(CASES[group])],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, f"the process ended with {child.returncode}: {child.stderr}"
    return json.loads(child.stdout), child.stderr


@pytest.mark.parametrize("group", CASES)
def test_a_damaged_file_gives_an_image_or_an_image_error(group):
    found, _ = outcome(group)
    assert found["wrong"] == []
    assert 0 < found["good"] < CASES[group]


@pytest.mark.parametrize("group", CASES)
def test_reasons_are_one_short_line(group):
    found, _ = outcome(group)
    assert found["reasons"]
    for reason in found["reasons"]:
        assert re.fullmatch(r"\S.{0,199}", reason), reason


@pytest.mark.parametrize("group", CASES)
def test_damaged_files_show_nothing_on_the_console(group):
    """Not even with all of Python's warnings switched on, as they are there."""
    _, shown = outcome(group)
    # libtiff writes some lines by itself, with no way to stop it for one thread.
    assert not re.search(r"Warning|Traceback|\.py", shown), shown
    assert group == "pillow" or shown == ""


@pytest.mark.parametrize("group", CASES)
def test_damaged_files_take_bounded_memory(group):
    found, _ = outcome(group)
    assert found["memory"] < MOST_MEMORY


@pytest.mark.parametrize("group", CASES)
def test_the_files_are_whole_before_they_are_damaged(group):
    for name, data in originals(group).items():
        # Its stream is padded in a way that only a reader that forgives truncation accepts.
        if name != "GDCMJ2K_TextGBR.dcm":
            assert decode(data).mode == "RGB", name


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
