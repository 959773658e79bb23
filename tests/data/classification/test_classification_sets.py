"""What holds for every classification set: layouts, splits, loading, refusals."""

import hashlib
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from medfast.data.classification import (
    CLASSIFICATION,
    EXTRA,
    SPLITS,
    facts,
    read,
    read_splits,
)
from medfast.data.decode import decode
from medfast.data.loader import Loader
from medfast.data.phantom.classification import VARIANTS, write_classification
from medfast.data.records import group_ids
from medfast.data.views import centre_box
from medfast.errors import UsageError
from medfast.evals.prompts.templates import TEMPLATES

KEYS = [*CLASSIFICATION, *EXTRA]


def _small(key):
    """Return the layout in which a set is soon written."""
    return "28" if "mnist" in key else ""


LAYOUTS = [(key, variant) for key in KEYS for variant in VARIANTS.get(key, (_small(key),))]
LAYOUTS += [("retinamnist", "224")]
# Of them upstream names who is shown.
KNOWN_PATIENTS = ("ham10000", "pad_ufes_20", "sicap", "vindr_mammo")


def _digests(split):
    return {hashlib.sha256(record.read()).digest() for record in split.samples}


def _origins(split):
    return {record.origin for record in split.samples} - {None}


def test_the_suite_has_its_twenty_sets():
    assert len(CLASSIFICATION) == 20
    assert sum("mnist" in key for key in CLASSIFICATION) == 11


@pytest.mark.parametrize("key", KEYS)
def test_facts_are_complete(key):
    of = facts(key)
    assert of.about.key == key
    assert len(set(of.classes)) == len(of.classes) >= 2
    assert of.modality in TEMPLATES
    assert set(of.overlaps) <= set(KEYS)
    assert all((of.about.licence, of.about.access, of.about.citation, of.folder))


def test_overlaps_and_grades_are_flagged():
    assert facts("pathmnist").overlaps == ("nct_crc",)
    assert facts("nct_crc").overlaps == ("pathmnist",)
    assert facts("dermamnist").overlaps == ("ham10000",)
    assert {key for key in KEYS if facts(key).graded} == {"retinamnist", "sicap"}
    assert {key for key in KEYS if facts(key).multi_label} == {"chestmnist"}
    assert "augmentations" in facts("lc25000_lung").notes[0]
    assert {key for key in KEYS if facts(key).zero_shot == "all"} == {
        "lc25000_lung",
        "lc25000_colon",
    }


@pytest.mark.parametrize(("key", "variant"), LAYOUTS)
def test_every_layout_is_read_with_all_its_labels(write, key, variant):
    root = write(key, variant=variant, per_class=20)
    of = facts(key)
    found = read_splits(key, root, (*SPLITS, "all"))
    everything = found.pop("all")
    count = len(of.classes)
    assert len(everything) == 20 * count
    labels = everything.labels.argmax(1) if of.multi_label else everything.labels
    assert Counter(labels.tolist()) == dict.fromkeys(range(count), 20)
    assert sum(map(len, found.values())) == len(everything)
    assert not any(split.skipped for split in found.values())
    test = len(found["test"]) / len(everything)
    assert 0.1 < test < 0.32
    if of.upstream:
        assert test == 0.2
    for split in found.values():
        assert split.classes == of.classes
        assert split.notes[: len(of.notes)] == of.notes
        keys = [record.key for record in split.samples]
        assert len(set(keys)) == len(keys) == len(split.labels)
        assert all(decode(record.read()).mode == "RGB" for record in split.samples[:3])


@pytest.mark.parametrize("key", ["bach", "lc25000_colon", "nct_crc"])
def test_splits_without_patients_are_stratified(write, key):
    found = read_splits(key, write(key, per_class=20), ("validation", "test"))
    for name, split in found.items():
        counts = Counter(split.labels.tolist())
        assert set(counts) == set(range(len(facts(key).classes)))
        if name == "test":
            assert set(counts.values()) == {5 if key == "bach" else 4}


@pytest.mark.parametrize("key", KEYS)
def test_no_patient_and_no_identical_image_is_on_both_sides(write, key):
    def same(sample):
        # One of two views of some patients shows what one of some others, of any class, shows.
        label, turn, view = sample.key[-3:]
        return turn % 3 if view == 0 and turn < 9 and label < 2 else None

    root = write(key, variant=_small(key), same=same, per_class=20)
    if key == "vindr_mammo":
        _make_dicom_files_equal(root)
    found = read_splits(key, root)
    of = facts(key)
    for of_split in (_digests, _origins, lambda s: {record.key for record in s.samples}):
        parts = [of_split(split) for split in found.values()]
        assert sum(map(len, parts)) == len(set.union(*parts))
    everything = read(key, root, "all")
    copies = len(everything) - len(_digests(everything))
    assert copies > 4
    left_out = [item for split in found.values() for item in split.skipped]
    assert len(left_out) + sum(map(len, found.values())) == len(everything)
    assert bool(left_out) == bool(of.upstream)
    assert not found["test"].skipped
    assert bool(_origins(everything)) == (key in KNOWN_PATIENTS)
    if of.upstream:
        assert len(found["test"]) == len(read(key, root, "test")) == len(everything) / 5
        assert all("another split" in item.reason for item in left_out)


def _make_dicom_files_equal(root):
    """Copy some files over others: as they name their patients, no two are ever equal."""
    files = sorted(root.glob("images/*/*.dicom"))
    for at in range(0, 40, 4):
        files[at].write_bytes(files[0].read_bytes())


@pytest.mark.parametrize("key", ["bach", "ham10000", "pad_ufes_20", "nct_crc"])
def test_splits_depend_on_names_and_bytes_alone(write, key, tmp_path):
    root = write(key, per_class=20)
    first = read_splits(key, root)
    moved = tmp_path / "moved"
    root.rename(moved)
    for table in moved.glob("*.csv"):
        header, *lines = table.read_text().splitlines()
        table.write_text("\n".join([header, *reversed(lines)]))
    second = read_splits(key, moved)
    for split in SPLITS:
        assert {r.key for r in first[split].samples} == {r.key for r in second[split].samples}


@pytest.mark.parametrize("key", ["pathmnist", "pcam", "ham10000", "vindr_mammo"])
def test_the_loader_gives_every_image_with_its_label(write, tokenizer, key):
    split = read(key, write(key, variant=_small(key), per_class=10), "test")
    images = [decode(record.read()) for record in split.samples]
    bilinear = Image.Resampling.BILINEAR
    expected = [np.asarray(i.resize((16, 16), bilinear, centre_box(*i.size))) for i in images]
    for workers in (0, 2):
        loader = Loader(split.samples, tokenizer, size=16, batch_size=3, workers=workers)
        batches = list(loader.epoch(0))
        assert not any(batch.skipped for batch in batches)
        found = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1)
        assert np.array_equal(found.numpy(), np.stack(expected))


def test_captions_name_the_class_and_groups_are_patients(write):
    split = read("pad_ufes_20", write("pad_ufes_20", per_class=20), "train")
    for record, label in zip(split.samples, split.labels, strict=True):
        assert record.caption == split.classes[label]
    groups = group_ids(split.samples)
    patients = [record.origin for record in split.samples]
    assert len(set(groups)) == len(set(patients)) < len(patients)


def test_a_class_can_be_left_out(write):
    root = write("nct_crc", per_class=20)
    all_nine = read_splits("nct_crc", root)
    eight = read_splits("nct_crc", root, without=["background"])
    for split in SPLITS:
        assert eight[split].classes == (*all_nine[split].classes[:1], *all_nine[split].classes[2:])
        assert set(eight[split].labels) == set(range(8))
        assert "without the class background" in eight[split].notes
        kept = [
            (record.key, all_nine[split].classes[label])
            for record, label in zip(all_nine[split].samples, all_nine[split].labels, strict=True)
            if label != 1
        ]
        assert kept == [(record.key, record.caption) for record in eight[split].samples]


def test_upstreams_test_split_needs_no_other(write):
    root = write("nct_crc", per_class=10)
    whole = read("nct_crc", root, "test")
    (root / "NCT-CRC-HE-100K").rename(root / "elsewhere")
    alone = read("nct_crc", root, "test")
    assert list(alone.samples) == list(whole.samples)
    with pytest.raises(UsageError, match="lacks NCT-CRC-HE-100K"):
        read("nct_crc", root, "train")


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_folder_says_what_to_get_and_under_which_licence(tmp_path, key):
    about = facts(key).about
    for root, what in ((tmp_path / "nowhere", "there is no "), (tmp_path, " lacks ")):
        with pytest.raises(UsageError) as raised:
            read(key, root, "test")
        sentence = str(raised.value)
        assert sentence.startswith(f"{key}: ")
        assert what in sentence
        assert f"{about.access} ({about.licence})" in sentence
        assert sentence.endswith("put it there, unpacked.")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("bahc", "test"), "classification set 'bahc' is not known. Did you mean 'bach'"),
        (("bach", "tset"), "split 'tset' is not known. Did you mean 'test'"),
        (("bach", "test", ["normal"]), "class of bach 'normal' is not known"),
    ],
)
def test_unknown_names_are_refused(tmp_path, arguments, match):
    key, *others = arguments
    with pytest.raises(UsageError, match=match):
        read(key, tmp_path, *others)


@pytest.mark.parametrize(
    "options", [{"variant": "png"}, {"per_class": 8}, {"per_class": 21}, {"seed": -1}]
)
def test_the_phantom_refuses_what_it_cannot_write(tmp_path, options):
    with pytest.raises(UsageError, match="phantom: "):
        write_classification(tmp_path, "bach", **options)


def test_classes_of_the_phantom_differ_in_what_they_show(write):
    """The real pictures: those of one class share a finding that no other class has."""
    from medfast.data.phantom import classification

    write("pcam", per_class=10)
    for key in ("organamnist", "chestmnist"):
        drawn = list(classification._draw(key, facts(key).upstream, 10, 0))
        shown = {}
        for own in drawn:
            finding = own.sample.case.finding
            look = finding and (finding.kind, finding.size, finding.count)
            shown.setdefault(own.label, set()).add(look)
        assert all(len(looks) == 1 for looks in shown.values())
        assert len(set.union(*shown.values())) == len(facts(key).classes)


def test_the_phantom_draws_its_own_pictures(tmp_path):
    split = read("breastmnist", write_classification(tmp_path, "breastmnist", per_class=10), "all")
    image = decode(split.samples[0].read())
    assert image.size == (224, 224)
    assert 10 < np.asarray(image).std() < 110


def test_the_table_of_sets_imports_nothing_heavy():
    code = (
        "import sys, medfast.data.classification; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'PIL')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
