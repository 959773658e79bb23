"""Every layout of the phantom is read back by the reader of the set whose layout it is."""

import json

import numpy as np
import pytest
from PIL import Image

from medfast.data import SPLITS, parse_source, read_split
from medfast.data.decode import decode
from medfast.data.phantom import LAYOUTS, source, write_phantom

PAIRS = 120
# Fewer would have none among the hundredth that is for validation.
QUILT_PAIRS = 700


@pytest.fixture(scope="module", params=LAYOUTS)
def written(request, tmp_path_factory):
    """Return layout, folder and the records of every split."""
    if request.param == "mimic_cxr_dicom":
        pytest.importorskip("pydicom")
    pairs = QUILT_PAIRS if request.param == "quilt" else PAIRS
    folder = tmp_path_factory.mktemp("layout") / "phantom"
    out = write_phantom(folder, layout=request.param, pairs=pairs, seed=1)
    key, root = parse_source(source(request.param, out))
    found = {split: read_split(key, root, split) for split in SPLITS}
    assert not any(part.skipped for part in found.values())
    return request.param, out, {split: part.records for split, part in found.items()}


def _sidecar(folder):
    return json.loads((folder / "phantom.json").read_text())


def test_every_pair_is_read_back(written):
    layout, _, records = written
    counts = {split: len(part) for split, part in records.items()}
    if layout == "quilt":
        assert counts == {"train": 628, "validation": 2, "test": 70}
    else:
        assert counts == {"train": 96, "validation": 12, "test": 12}


def test_keys_splits_and_studies_are_those_of_the_sidecar(written):
    _, folder, records = written
    samples = _sidecar(folder)["samples"]
    found = {r.key: (split, r.study) for split, part in records.items() for r in part}
    assert found == {key: (s["split"], s["study"]) for key, s in samples.items()}


def test_captions_are_the_phantoms(written, phantom):
    layout, _, records = written
    known = {r.caption for split in SPLITS for r in read_split("roco", phantom, split).records}
    found = {r.caption for part in records.values() for r in part}
    if layout == "quilt":
        assert len(found) > QUILT_PAIRS / 2
    elif layout.startswith("mimic_cxr"):
        # The views of a study share the caption of the first.
        assert found < known
    else:
        assert found == known


def test_questions_ask_about_pairs_that_are_there(written):
    _, folder, records = written
    captions = {r.key: r.caption for part in records.values() for r in part}
    questions = _sidecar(folder)["questions"]
    assert questions
    assert all(captions[q["id"]] == q["true"] != q["false"] for q in questions)


def test_no_patient_or_study_is_in_two_splits(written):
    _, _, records = written
    for name in ("study", "origin"):
        parts = [{getattr(r, name) for r in part} - {None} for part in records.values()]
        assert sum(map(len, parts)) == len(set.union(*parts))


def test_images_are_those_of_the_roco_layout(written, phantom):
    """Bit for bit, but for DICOM, which is grey and not compressed."""
    layout, _, records = written
    if layout == "mimic_cxr_dicom":
        for record in records["test"]:
            image = decode(record.read())
            assert min(image.size) >= 128
            assert np.asarray(image).std() > 5
            assert record.read()[128:132] == b"DICM"
        return
    if layout == "quilt":
        assert Image.open(records["train"][0].image).format == "JPEG"
        return
    known = {r.read() for split in SPLITS for r in read_split("roco", phantom, split).records}
    assert {r.read() for part in records.values() for r in part} == known


@pytest.mark.parametrize("layout", ["mimic_cxr_dicom", "csv"])
def test_files_depend_on_nothing_but_the_arguments(tmp_path, layout):
    pytest.importorskip("pydicom")
    a, b = (
        write_phantom(tmp_path / name, layout=layout, pairs=30, seed=2, workers=n)
        for name, n in (("a", 1), ("b", 2))
    )
    files = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(b) for p in b.rglob("*") if p.is_file())
    assert all((a / p).read_bytes() == (b / p).read_bytes() for p in files)
