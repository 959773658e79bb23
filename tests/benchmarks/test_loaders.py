"""The benchmark of the loaders measures what it says."""

import time

import pytest
import torch

from benchmarks import loaders
from medfast.data.tokens import Tokenizer

pytest.importorskip("nvidia.dali")
CPU = torch.device("cpu")


def test_a_rate_is_that_of_known_sleeps_without_the_start():
    def batches():
        time.sleep(0.3)
        for _ in range(5):
            yield torch.empty(10)
            time.sleep(0.02)

    assert 300 < loaders.rate(batches) <= 400  # 40 images in 5 sleeps of 20 ms


def test_a_target_compares_dali_with_open_clip_place_by_place():
    rows = [
        {"place": place, "threads": 2, "variant": variant, "images_per_s": rate}
        for place, variant, rate in (
            *(("files", "medfast dali", 130.0), ("files", "open_clip", 100.0)),
            *(("shards", "medfast dali", 120.0), ("shards", "open_clip", 100.0)),
        )
    ]
    found = {one["place"]: (one["measured"], one["met"]) for one in loaders.verdicts(rows)}
    assert found == {"files": (1.3, True), "shards": (1.2, False)}
    result = {"rows": rows, "targets": loaders.verdicts(rows), "needed": {"A100": 1000.0}}
    text = "\n".join(loaders.summary(result))
    assert "| files | 2 | medfast dali | 130 | 1.30x |" in text
    assert "NOT MET from shards with 2 threads" in text
    assert "1,000 on an A100" in text


def test_every_loader_gives_what_is_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(loaders, "BATCH_SIZE", 16)
    monkeypatch.setattr(loaders, "FILES", 4)
    write = loaders.write_images
    monkeypatch.setattr(loaders, "write_images", lambda folder: write(folder, 4, 256))
    tokenizer = Tokenizer.train([loaders.CAPTION], 512, 77)
    found = loaders.sources(tmp_path, 64, shards=2)
    assert {place: len(records) for place, records in found.items()} == {"files": 64, "shards": 64}
    for place, records in found.items():
        assert loaders.check(records, tokenizer, CPU) < 0.5
        variants = [loaders.own(kind, records, tokenizer, 1, CPU) for kind in ("dali", "torch")]
        variants.append(loaders.open_clip(tmp_path, place, 64, 1))
        for variant in variants:
            batches = [(b.shape, b.dtype, b.mean().abs() < 3) for b in variant()]
            assert batches == [((16, 3, 224, 224), torch.float32, True)] * 4


def test_a_leak_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(loaders, "BATCH_SIZE", 4)
    write = loaders.write_images
    monkeypatch.setattr(loaders, "write_images", lambda folder: write(folder, 4, 64))
    assert loaders.soak(tmp_path, 240, "dali", 1)["samples"] == 240
    kept, resident = [], loaders.resident

    def leaking():
        kept.append(b"x" * (32 * 2**20))
        return resident()

    monkeypatch.setattr(loaders, "resident", leaking)
    (tmp_path / "again").mkdir()
    with pytest.raises(AssertionError):
        loaders.soak(tmp_path / "again", 240, "dali", 1)


def test_what_a_card_needs_follows_from_the_flops():
    need = loaders.needed()
    # 35 GFLOP of the image tower and 6 of the text tower forward, three times that in training.
    assert need["A100"] == pytest.approx(0.4 * 312e12 / (3 * 41e9), rel=0.15)
    assert need["H200"] / need["A100"] == pytest.approx(989 / 312)
