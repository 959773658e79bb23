"""Every layout of the phantom is read back by the reader of the set whose layout it is."""

import json

import numpy as np
import pytest
from PIL import Image

from medfast.data import SPLITS, parse_source, read_split
from medfast.data.decode import decode
from medfast.data.phantom import DOMAINS, LAYOUTS, source, write_phantom

PAIRS = 120
# Fewer would have none among the hundredth that is for validation.
QUILT_PAIRS = 700
HELD = [
    (layout, domain)
    for layout in LAYOUTS
    for domain in DOMAINS
    if LAYOUTS[layout].domain in ("", domain)
]


@pytest.fixture(scope="module", params=HELD, ids="-".join)
def written(request, tmp_path_factory):
    """Return layout, folder and the records of every split."""
    layout, domain = request.param
    if layout == "mimic_cxr_dicom":
        pytest.importorskip("pydicom")
    pairs = QUILT_PAIRS if layout == "quilt" else PAIRS
    folder = tmp_path_factory.mktemp("layout") / "phantom"
    out = write_phantom(folder, layout=layout, pairs=pairs, seed=1, domain=domain)
    key, root = parse_source(source(layout, out))
    found = {split: read_split(key, root, split) for split in SPLITS}
    assert not any(part.skipped for part in found.values())
    return layout, out, {split: part.records for split, part in found.items()}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Return the records in ROCO's layout, by what the sidecar says made them."""
    folder = tmp_path_factory.mktemp("originals")
    roots = [
        write_phantom(folder / domain, pairs=PAIRS, seed=1, domain=domain) for domain in DOMAINS
    ]
    return {
        _sidecar(root)["generator"]: [
            r for s in SPLITS for r in read_split("roco", root, s).records
        ]
        for root in roots
    }


def _sidecar(folder):
    return json.loads((folder / "phantom.json").read_text())


def test_every_pair_is_read_back(written):
    layout, _, records = written
    counts = {split: len(part) for split, part in records.items()}
    if layout == "quilt":
        assert counts["test"] == QUILT_PAIRS // 10
        # A hundredth of the others by a hash, so not exactly.
        assert 1 <= counts["validation"] <= 16
        assert sum(counts.values()) == QUILT_PAIRS
    else:
        assert counts == {"train": 96, "validation": 12, "test": 12}


def test_keys_splits_and_studies_are_those_of_the_sidecar(written):
    _, folder, records = written
    samples = _sidecar(folder)["samples"]
    found = {r.key: (split, r.study) for split, part in records.items() for r in part}
    assert found == {key: (s["split"], s["study"]) for key, s in samples.items()}


def test_captions_are_the_phantoms(written, originals):
    layout, folder, records = written
    known = {r.caption for r in originals[_sidecar(folder)["generator"]]}
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


def test_images_are_those_of_the_roco_layout(written, originals):
    """Bit for bit, but for DICOM, which is grey and not compressed."""
    layout, folder, records = written
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
    known = {r.read() for r in originals[_sidecar(folder)["generator"]]}
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
