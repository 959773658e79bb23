"""The DALI loader against its twin, and what it does with files that are not for DALI."""

import dataclasses
import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from medfast.data import read_split
from medfast.data.loader import Loader
from medfast.data.pipelines import DaliLoader, _pipeline, pick_loader
from medfast.data.records import Record
from medfast.data.views import NO_EXTRA, Extra
from medfast.errors import UsageError

pytest.importorskip("nvidia.dali")

CPU = torch.device("cpu")


@pytest.fixture
def twins(tokenizer):
    """Return (plain batch, DALI batch, DALI loader) of an epoch of one batch."""

    def make(records, size=64, crop=0.5, extra=NO_EXTRA):
        arguments = (records, tokenizer, size, len(records), crop, 0, 2, extra)
        dali = DaliLoader(*arguments, device=CPU)
        (expected,), (found,) = Loader(*arguments[:6], 0, extra).epoch(0), dali.epoch(0)
        return expected, found, dali

    return make


def _photograph(width, height, seed=0):
    """Return an RGB image with detail at all scales."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for side in (2, 5, 13, 34):
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        total += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), float)
    return Image.fromarray((total / 4).astype(np.uint8))


def _files(folder, images, **options):
    records = []
    for number, image in enumerate(images):
        path = folder / f"{number}.jpg"
        image.save(path, **options)
        records.append(Record(str(number), path, "a caption"))
    return records


def _hide_tables(path):
    """Leave a JPEG file its headers, but not the tables to decode it by."""
    # As an application's segment, which decoders pass over.
    path.write_bytes(path.read_bytes().replace(b"\xff\xdb", b"\xff\xef"))


def _difference(a, b):
    return (a.int() - b.int()).abs().float().mean((1, 2, 3)).max().item()


SIZES = [(512, 512), (300, 700), (701, 301), (64, 64), (40, 30), (9, 200), (1, 1), (1024, 768)]


@pytest.mark.parametrize("crop", [None, 0.5])
@pytest.mark.parametrize(
    "options",
    [{"quality": 90}, {"quality": 60}, {"progressive": True}, {"subsampling": 0}],
    ids=["4:2:0", "low quality", "progressive", "4:4:4"],
)
def test_pixels_agree_within_the_resamplers_tolerance(tmp_path, twins, crop, options):
    records = _files(tmp_path, [_photograph(*size) for size in SIZES], **options)
    expected, found, loader = twins(records, crop=crop, extra=Extra(images=2))
    assert loader.failures == 0
    assert torch.equal(found.index, expected.index)
    # Stated in the README: on average below half a level of 255.
    assert _difference(found.images, expected.images) < 0.5
    for a, b in zip(found.views, expected.views, strict=True):
        assert _difference(a, b) < 1.0


def test_grey_files_agree(tmp_path, twins):
    records = _files(tmp_path, [_photograph(200, 150).convert("L")] * 3)
    expected, found, loader = twins(records)
    assert loader.failures == 0
    assert _difference(found.images, expected.images) < 0.5


def test_the_tolerance_would_show_another_crop(tmp_path, twins):
    records = _files(tmp_path, [_photograph(512, 512)])
    expected, _, _ = twins(records)
    shifted = torch.roll(expected.images, 1, dims=-1)
    assert _difference(shifted, expected.images) > 2


def test_what_is_no_plain_jpeg_is_decoded_as_the_plain_loader_does(tmp_path, twins):
    picture = _photograph(90, 70)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "cmyk.jpg": (picture.convert("CMYK"), {}),
        "turned.jpg": (picture, {"exif": exif}),
        "a.png": (picture, {}),
        "palette.png": (picture.convert("P"), {}),
        "16.png": (Image.fromarray(np.asarray(picture.convert("L"), np.uint16) * 257), {}),
        "a.tiff": (picture, {}),
        "a.jp2": (picture, {}),
        "plain.jpg": (picture, {}),
        "named.jpg": (picture, {"format": "PNG"}),
        "profile.jpg": (
            picture,
            {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()},
        ),
    }
    records = []
    for name, (image, options) in files.items():
        image.save(tmp_path / name, **options)
        records.append(Record(name, tmp_path / name, name))
    expected, found, loader = twins(records)
    assert loader.failures == 0
    assert not found.skipped
    assert found.index.tolist() == expected.index.tolist()
    assert _difference(found.images, expected.images) < 0.5
    names = [records[i].key for i in found.index.tolist()]
    exact = [n for n, name in enumerate(names) if name not in ("plain.jpg", "profile.jpg")]
    assert torch.equal(found.images[exact], expected.images[exact])


def test_a_batch_that_dali_fails_on_is_decoded_one_by_one(tmp_path, twins, monkeypatch, caplog):
    records = _files(tmp_path, [_photograph(100, 100, seed) for seed in range(4)])
    _hide_tables(records[1].image)
    monkeypatch.setattr(logging.getLogger("medfast"), "propagate", True)
    expected, found, loader = twins(records)
    assert loader.failures == 1
    assert "DALI failed on a batch" in caplog.text
    assert torch.equal(found.images, expected.images)
    assert [s.key for s in found.skipped] == [s.key for s in expected.skipped] == ["1"]


def test_after_a_failure_dali_decodes_again(tmp_path, tokenizer):
    records = _files(tmp_path, [_photograph(100, 100, seed) for seed in range(6)])
    _hide_tables(records[1].image)
    loader = DaliLoader(records, tokenizer, 32, 2, device=CPU)
    sizes = [len(batch) for batch in loader.epoch(0)]
    assert sizes == [1, 2, 2]
    assert loader.failures == 1


def test_dali_accepts_the_pipeline_for_a_gpu(monkeypatch):
    """Its operators and their arguments, as far as DALI judges them without a GPU."""
    from nvidia.dali import Pipeline

    outputs = []
    monkeypatch.setattr(Pipeline, "set_outputs", lambda _, *nodes: outputs.extend(nodes))
    monkeypatch.setattr(Pipeline, "build", lambda _: None)
    _pipeline(4, 2, torch.device("cuda", 0), size=64, views=2)
    assert [node.device for node in outputs] == ["gpu", "gpu"]


def test_a_mixed_batch_keeps_its_order(tmp_path, twins):
    records = _files(tmp_path, [_photograph(80, 80, seed) for seed in range(6)])
    for number in (0, 3):
        data = io.BytesIO()
        Image.open(records[number].image).save(data, "PNG")
        records[number].image.write_bytes(data.getvalue())
    records[4].image.unlink()
    expected, found, _ = twins(records, extra=Extra(images=1))
    assert found.index.tolist() == expected.index.tolist()
    assert sorted(found.index.tolist()) == [0, 1, 2, 3, 5]
    assert _difference(found.images, expected.images) < 0.5
    assert _difference(found.views[0], expected.views[0]) < 1.0


def test_captions_are_reworded_and_masked_alike(tmp_path, twins):
    records = _files(tmp_path, [_photograph(80, 80, seed) for seed in range(8)])
    records = [
        dataclasses.replace(record, caption=f"one large nodule in the left lung, slice {number}")
        for number, record in enumerate(records)
    ]
    records[4].image.unlink()
    expected, found, _ = twins(records, extra=Extra(texts=2, masked=True))
    for a, b in zip(found.texts, expected.texts, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.word_mask, b.word_mask)
    assert not torch.equal(found.texts[0].ids, found.ids)
    assert torch.equal(found.masked.ids, expected.masked.ids)
    assert torch.equal(found.masked.labels, expected.masked.labels)


def test_bytes_of_damaged_files_give_what_the_plain_loader_gives(tmp_path, tokenizer):
    """Random damage behind the header: both loaders use, or skip, the same samples."""
    rng = np.random.default_rng(0)
    records = _files(tmp_path, [_photograph(64, 64, seed) for seed in range(48)])
    for record in records[8:]:
        data = bytearray(record.image.read_bytes())
        for at in rng.integers(2, len(data), rng.integers(1, 9)):
            data[at] = rng.integers(256)
        record.image.write_bytes(bytes(data))
    arguments = (records, tokenizer, 32, 8)
    plain = [batch.index.tolist() for batch in Loader(*arguments).epoch(0)]
    dali = [batch.index.tolist() for batch in DaliLoader(*arguments, device=CPU).epoch(0)]
    assert dali == plain


def test_auto_takes_dali_for_plain_jpegs_alone(tmp_path, phantom):
    records = read_split("roco", phantom, "train").records
    assert pick_loader("auto", records) == "dali"
    assert pick_loader("torch", records) == "torch"
    path = tmp_path / "a.png"
    Image.new("L", (8, 8)).save(path)
    others = [dataclasses.replace(record, image=path) for record in records]
    assert pick_loader("auto", others) == "torch"
    assert pick_loader("dali", others) == "dali"
    missing = [dataclasses.replace(record, image=tmp_path / "none.jpg") for record in records]
    assert pick_loader("auto", missing) == "torch"


def test_dali_that_is_not_installed_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert pick_loader("auto", []) == "torch"
    with pytest.raises(UsageError, match=r"--loader dali needs NVIDIA DALI.*pip install"):
        pick_loader("dali", [])
