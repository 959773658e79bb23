import dataclasses
import multiprocessing
import os
import pickle
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medfast.data import read_split
from medfast.data.loader import Loader
from medfast.data.order import Order
from medfast.data.pipelines import make_loader
from medfast.data.records import Record, Records, clean_caption, group_ids
from medfast.data.views import Extra
from medfast.errors import UsageError

KINDS = ["torch", "dali"]
CPU = torch.device("cpu")
LONG = "one large nodule in the left lung and two small cysts in the right kidney"


def read(root, split):
    return read_split("roco", root, split).records


def _batches(loader, epoch=0):
    return list(loader.epoch(epoch))


def _tensors(part):
    """Return all tensors of batches, or of a part of one."""
    if isinstance(part, torch.Tensor):
        return [part]
    if dataclasses.is_dataclass(part):
        part = [getattr(part, field.name) for field in dataclasses.fields(part)]
    return [t for own in part for t in _tensors(own)] if isinstance(part, (list, tuple)) else []


def _same(a, b):
    a, b = _tensors(a), _tensors(b)
    return len(a) == len(b) and all(map(torch.equal, a, b))


def _words(batches):
    """Return what the captions of batches became, by sample and without padding."""
    return {
        sample: (
            [text.ids[row][text.mask[row]].tolist() for text in batch.texts],
            batch.masked.ids[row][batch.mask[row]].tolist(),
            batch.masked.labels[row][batch.mask[row]].tolist(),
        )
        for batch in batches
        for row, sample in enumerate(batch.index.tolist())
    }


@pytest.fixture(params=KINDS)
def make(request, tokenizer):
    """Make a loader of either kind of 32-pixel images."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")

    def make(records, batch_size, crop=None, seed=0, workers=0, **more):
        arguments = (records, tokenizer, 32, batch_size, crop, seed, workers)
        return make_loader(request.param, CPU, *arguments, **more)

    return make


def test_an_epoch_depends_on_its_number_and_the_seed_alone(phantom, make):
    records = read(phantom, "train")

    def epoch(number, seed=0, workers=0, images=1):
        extra = Extra(images, texts=1, masked=True)
        return _batches(make(records, 8, 0.8, seed, workers, extra=extra), number)

    first = epoch(3)
    assert _same(first, epoch(3))
    assert _same(first, epoch(3, workers=2))
    assert not _same(first, epoch(4))
    assert not _same(first, epoch(3, seed=1))
    # The main view does not depend on how many others there are.
    assert all(
        torch.equal(a.images, b.images) for a, b in zip(first, epoch(3, images=0), strict=True)
    )


@pytest.mark.parametrize("start", [1, 5, 11, 12])
def test_an_epoch_goes_on_from_any_batch(phantom, make, start):
    records = read(phantom, "train")
    loader = make(records, 8, 0.8, extra=Extra(images=1, texts=1, masked=True))
    assert _same(_batches(loader)[start:], list(loader.epoch(0, start)))


def test_ranks_share_the_batch_of_one_process(phantom, make):
    records = read(phantom, "train")
    whole = _batches(make(records, 12, 0.8), 2)
    parts = [
        _batches(make(records, 4, 0.8, order=Order([len(records)], 4, rank=r, world=3)), 2)
        for r in range(3)
    ]
    for step, batch in enumerate(whole):
        shares = [part[step] for part in parts]
        assert torch.equal(batch.index, torch.cat([s.index for s in shares]))
        assert torch.equal(batch.images, torch.cat([s.images for s in shares]))


def test_making_batches_leaves_the_training_generator_alone(phantom, make):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    before_texts = random.getstate()
    _batches(make(read(phantom, "validation"), 4, 0.8, extra=Extra(1, texts=1, masked=True)))
    assert torch.equal(before, torch.get_rng_state())
    assert random.getstate() == before_texts


def test_a_training_epoch_drops_the_short_batch_and_evaluation_keeps_it(phantom, make):
    records = read(phantom, "train")[:21]
    assert [len(b) for b in _batches(make(records, 8, 0.8))] == [8, 8]
    held_out = _batches(make(records, 8))
    assert torch.cat([b.index for b in held_out]).tolist() == list(range(21))


def test_fewer_pairs_than_a_batch_make_one_batch(phantom, make):
    records = read(phantom, "train")[:5]
    assert [len(b) for b in _batches(make(records, 8, 0.8))] == [5]


@pytest.mark.parametrize(("flip", "fewest", "most"), [(True, 6, 34), (False, 0, 0)])
def test_crops_keep_sides_and_only_extra_views_are_flipped(tmp_path, make, flip, fewest, most):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = 255  # bright on the left
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    records = [Record("a", tmp_path / "a.jpg", "left")]
    flipped = 0
    loader = make(records, 1, 0.5, extra=Extra(images=2, flip=flip))
    for epoch in range(20):
        (batch,) = _batches(loader, epoch)
        left, right = (
            batch.images[0, ..., part].float().mean() for part in (slice(4), slice(-4, None))
        )
        assert left > right
        for view in batch.views:
            flipped += bool(view[0, ..., :4].float().mean() < view[0, ..., -4:].float().mean())
    assert fewest <= flipped <= most


def test_damaged_samples_are_skipped_with_their_reason(own_phantom, make):
    records = read(own_phantom, "train")[:8]
    whole = records[0].image.read_bytes()
    records[0].image.write_bytes(whole[: len(whole) // 2])
    records[1].image.write_bytes(b"")
    records[2].image.unlink()
    records[3] = dataclasses.replace(records[3], caption="")
    records[4].image.unlink()
    os.mkfifo(records[4].image)  # to open it would wait for ever
    records[5].image.unlink()
    records[5].image.mkdir()
    (batch,) = _batches(make(records, 8, extra=Extra(images=1, texts=1, masked=True)))
    assert batch.index.tolist() == [6, 7]
    assert [len(view) for view in batch.views] == [2]
    assert len(batch.texts[0].ids) == len(batch.masked.labels) == 2
    reasons = {s.key: s.reason for s in batch.skipped}
    assert list(reasons) == [r.key for r in records[:6]]
    assert "truncated" in reasons[records[0].key]
    assert "empty" in reasons[records[1].key] or "cannot identify" in reasons[records[1].key]
    assert "FileNotFoundError" in reasons[records[2].key]
    assert "caption is empty" in reasons[records[3].key]
    assert "no plain file" in reasons[records[4].key]
    assert "no plain file" in reasons[records[5].key]


def test_a_batch_may_lose_all_its_samples(own_phantom, make):
    records = read(own_phantom, "train")[:2]
    loader = make(records, 8, extra=Extra(images=2, texts=1, masked=True))
    (full,) = _batches(loader)
    for record in records:
        record.image.unlink()
    (batch,) = _batches(loader)
    assert len(batch) == 0
    assert len(batch.views) == len(batch.skipped) == 2
    # Nothing but the number of pairs, and of tokens, tells it from others.
    for empty, other in zip(_tensors(batch), _tensors(full), strict=True):
        assert len(empty) == 0
        assert (empty.dtype, empty.dim()) == (other.dtype, other.dim())


def test_views_and_masks_of_a_caption_do_not_depend_on_the_batch(phantom, make):
    records = read(phantom, "train")
    extra = Extra(texts=2, masked=True)
    found = _words(_batches(make(records, 8, extra=extra)))
    assert len(found) == len(records)
    assert found == _words(_batches(make(records, 7, workers=1, extra=extra)))


def test_each_turn_and_each_view_words_a_caption_anew(phantom, make):
    records = read(phantom, "train")[:16]
    loader = make(records, 16, extra=Extra(texts=2, masked=True))
    (first,), (second,) = _batches(loader, 0), _batches(loader, 1)
    views = [*first.texts, *second.texts, first, second]
    views = [[row[mask].tolist() for row, mask in zip(v.ids, v.mask, strict=True)] for v in views]
    assert views.pop() == views[-1]  # the captions themselves stay
    assert all(a != b for n, a in enumerate(views) for b in views[:n])
    assert not _same(first.masked, second.masked)


def test_pairs_that_share_a_caption_differ_in_its_views_and_masks(phantom, make):
    records = [dataclasses.replace(r, caption=LONG) for r in read(phantom, "train")[:8]]
    found = _words(_batches(make(records, 8, extra=Extra(texts=1, masked=True)))).values()
    assert len({str(texts) for texts, _, _ in found}) > 4
    assert len({str(masks) for _, *masks in found}) > 4


def test_the_masked_caption_is_the_caption(phantom, make):
    for batch in _batches(make(read(phantom, "train"), 8, extra=Extra(masked=True))):
        hidden = batch.masked.labels >= 0
        assert hidden.any(1).all()
        assert torch.equal(torch.where(hidden, batch.masked.labels, batch.masked.ids), batch.ids)


@pytest.mark.parametrize("extra", [Extra(texts=2), Extra(masked=True), Extra(texts=2, masked=True)])
def test_more_from_captions_changes_nothing_else(phantom, make, extra):
    records = read(phantom, "train")[:24]

    def epoch(extra):
        return _batches(make(records, 8, 0.8, extra=extra), 3)

    plain = epoch(Extra(images=1))
    found = epoch(dataclasses.replace(extra, images=1))
    assert _same([dataclasses.replace(b, texts=(), masked=None) for b in found], plain)
    most = epoch(Extra(texts=3, masked=True))
    assert _same([b.texts for b in found], [b.texts[: extra.texts] for b in most])
    assert _same([b.masked for b in found], [b.masked for b in most if extra.masked])


def test_all_of_a_batch_moves_to_a_device(own_phantom, make):
    records = read(own_phantom, "train")[:3]
    records[0].image.unlink()
    (batch,) = _batches(make(records, 8, extra=Extra(images=1, texts=1, masked=True)))
    moved = batch.to(torch.device("meta"))
    assert len(_tensors(moved)) == 6 + 1 + 3 + 2
    assert all(tensor.is_meta for tensor in _tensors(moved))
    assert moved.skipped == batch.skipped
    assert len(moved.skipped) == 1


def test_an_abandoned_epoch_ends_at_once(phantom, make):
    loader = make(read(phantom, "train"), 8, 0.8, workers=1)
    batches = loader.epoch(0)
    first = next(batches)
    batches.close()
    assert torch.equal(next(loader.epoch(0)).images, first.images)


def test_a_member_of_an_archive_is_read_where_it_lies(tmp_path, phantom, make):
    records = read(phantom, "train")[:3]
    archive, moved = b"", []
    for record in records:
        data = record.read()
        moved.append(
            dataclasses.replace(record, image=tmp_path / "a.tar", span=(len(archive), len(data)))
        )
        archive += data + b"more"
    (tmp_path / "a.tar").write_bytes(archive)
    (expected,), (found,) = _batches(make(records, 8)), _batches(make(moved, 8))
    assert torch.equal(found.images, expected.images)
    (tmp_path / "a.tar").write_bytes(archive[: moved[2].span[0] + 5])
    (cut,) = _batches(make(moved, 8))
    assert cut.index.tolist() == [0, 1]
    assert "the archive ends within the image (5 of" in cut.skipped[0].reason
    assert "a.tar" in cut.skipped[0].path


def test_a_file_that_would_fill_the_memory_is_not_read(tmp_path, make):
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(2**40)  # sparse: it takes no room on disk
    (batch,) = _batches(make([Record("a", tmp_path / "a.jpg", "x")], 8))
    assert "more than" in batch.skipped[0].reason


def test_a_killed_worker_is_a_sentence(phantom, tokenizer, monkeypatch):
    monkeypatch.setattr("medfast.data.loader.decode", lambda data: os._exit(9))
    with pytest.raises(UsageError, match="--workers was ended from outside"):
        _batches(Loader(read(phantom, "train"), tokenizer, 32, 8, workers=1))


def test_a_sigterm_to_all_leaves_the_workers_to_the_process_that_then_saves(phantom, tokenizer):
    loader = Loader(read(phantom, "train"), tokenizer, 32, 4, workers=1)
    batches = loader.epoch(0)
    first = next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGTERM)
    assert len([first, *batches]) == len(loader)


def test_groups_follow_the_study():
    records = [Record(str(i), None, "x", study) for i, study in enumerate(["a", None, "a", None])]
    assert group_ids(records).tolist() == [0, 1, 0, 2]


def test_records_in_one_block_are_the_records():
    records = [
        Record("a", Path("/x/a.jpg"), "one é \U0001fac1"),
        Record("b", Path("y/b.tar"), "", "study", "article PMC1", (512, 7)),
        Record("c\udcff", Path("c\udcff"), "a name that is not UTF-8"),
    ]
    block = Records(iter(records))
    assert list(block) == records
    assert (len(block), block[-1], block[1:]) == (3, records[2], records[1:])
    assert list(pickle.loads(pickle.dumps(block))) == records
    assert len(Records([])) == 0
    with pytest.raises(IndexError):
        block[3]


def test_white_space_in_captions_is_squeezed():
    assert clean_caption(" a\tb\r\n\n c\u00a0d ") == "a b c d"


def test_half_a_character_in_a_caption_becomes_a_question_mark():
    assert clean_caption("\ud83d chest") == "? chest"
