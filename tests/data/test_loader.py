import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from medfast.data.loader import Loader, decode
from medfast.data.records import Record, clean_caption, group_ids
from medfast.data.roco import read


def _batches(loader, epoch=0):
    return list(loader.epoch(epoch))


def _same(a, b):
    return all(
        torch.equal(getattr(x, f.name), getattr(y, f.name))
        for x, y in zip(a, b, strict=True)
        for f in dataclasses.fields(x)
        if f.name != "skipped"
    )


def test_an_epoch_depends_on_its_number_and_the_seed_alone(phantom, tokenizer):
    records = read(phantom, "train")

    def epoch(number, seed=0, workers=0):
        return _batches(Loader(records, tokenizer, 32, 8, 0.8, seed, workers), number)

    first = epoch(3)
    assert _same(first, epoch(3))
    assert _same(first, epoch(3, workers=2))
    assert not _same(first, epoch(4))
    assert not _same(first, epoch(3, seed=1))


def test_making_batches_leaves_the_training_generator_alone(phantom, tokenizer):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    _batches(Loader(read(phantom, "validation"), tokenizer, 32, 4, crop=0.8))
    assert torch.equal(before, torch.get_rng_state())


def test_a_training_epoch_drops_the_short_batch_and_evaluation_keeps_it(phantom, tokenizer):
    records = read(phantom, "train")[:21]
    assert [len(b) for b in _batches(Loader(records, tokenizer, 32, 8, crop=0.8))] == [8, 8]
    held_out = _batches(Loader(records, tokenizer, 32, 8))
    assert torch.cat([b.index for b in held_out]).tolist() == list(range(21))


def test_fewer_pairs_than_a_batch_make_one_batch(phantom, tokenizer):
    records = read(phantom, "train")[:5]
    assert [len(b) for b in _batches(Loader(records, tokenizer, 32, 8, crop=0.8))] == [5]


def test_crops_keep_sides(tmp_path, tokenizer):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = 255  # bright on the left
    Image.fromarray(pixels).save(tmp_path / "a.png")
    records = [Record("a", tmp_path / "a.png", "left")]
    for epoch in range(20):
        (batch,) = _batches(Loader(records, tokenizer, 16, 1, crop=0.5), epoch)
        image = batch.images[0].float()
        assert image[..., :4].mean() > image[..., -4:].mean()


def test_damaged_samples_are_skipped_with_their_reason(own_phantom, tokenizer):
    records = read(own_phantom, "train")[:6]
    whole = records[0].image.read_bytes()
    records[0].image.write_bytes(whole[: len(whole) // 2])
    records[1].image.write_bytes(b"")
    records[2].image.unlink()
    records[3] = dataclasses.replace(records[3], caption="")
    (batch,) = _batches(Loader(records, tokenizer, 32, 8))
    assert batch.index.tolist() == [4, 5]
    reasons = {s.key: s.reason for s in batch.skipped}
    assert list(reasons) == [r.key for r in records[:4]]
    assert "truncated" in reasons[records[0].key]
    assert "cannot identify" in reasons[records[1].key]
    assert "FileNotFoundError" in reasons[records[2].key]
    assert "caption is empty" in reasons[records[3].key]


def test_a_batch_may_lose_all_its_samples(own_phantom, tokenizer):
    records = read(own_phantom, "train")[:2]
    for record in records:
        record.image.unlink()
    (batch,) = _batches(Loader(records, tokenizer, 32, 8))
    assert len(batch) == 0
    assert len(batch.skipped) == 2


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    ramp = np.tile(np.linspace(0, 255, 16, dtype=np.uint8), (16, 1))
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 16)  # 12 bits, as scanners give
    else:
        image = Image.fromarray(ramp).convert("RGB").convert(mode)
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    image.save(path)
    found = np.asarray(decode(path))
    assert found.shape == (16, 16, 3)
    assert found[:, 0].max() < 20
    assert found[:, -1].min() > 235


def test_a_rotated_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (10, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert decode(tmp_path / "a.jpg").size == (20, 10)


def test_groups_follow_the_study():
    records = [Record(str(i), None, "x", study) for i, study in enumerate(["a", None, "a", None])]
    assert group_ids(records) == [0, 1, 0, 2]


def test_white_space_in_captions_is_squeezed():
    assert clean_caption(" a\tb\r\n\n c\u00a0d ") == "a b c d"
