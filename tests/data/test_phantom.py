import hashlib
import itertools
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medfast.data.phantom import DOMAINS, GENERATOR_VERSION, cached_phantom, write_phantom
from medfast.data.phantom.canvas import Canvas
from medfast.data.phantom.cases import DETAILS, SPLITS, Finding
from medfast.data.phantom.medical import anatomy, caption, findings, prompts, render
from medfast.data.phantom.medical.captions import _FINDING_NOUNS
from medfast.data.phantom.medical.cases import CLASSES, SECTIONS
from medfast.data.phantom.placing import centres
from medfast.errors import UsageError

PAIRS = 1200
sample_all = DOMAINS["medical"].samples
false_captions = DOMAINS["medical"].false_captions
WORDS = {
    "left": ("left",),
    "right": ("right",),
    "small": ("small", "tiny", "little"),
    "large": ("large", "big", "bulky"),
    "one": ("single", "one", "solitary"),
    "two": ("two", "pair", "paired"),
    "three": ("three", "trio"),
    "nodule": ("nodule", "nodules"),
    "cyst": ("cyst", "cysts", "cavity", "cavities"),
    "spiculated mass": ("mass", "masses"),
    "wedge": ("wedge", "triangular"),
    "calcifications": ("calcifications", "microcalcifications", "calcified"),
    "crescent": ("crescent", "crescentic"),
}


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp("phantom") / "set", pairs=PAIRS)


@pytest.fixture(scope="module")
def sidecar(phantom):
    return json.loads((phantom / "phantom.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def samples():
    return sample_all(3000, seed=1)


def _digests(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def _words(text):
    return text.lower().replace("-", " ").translate(str.maketrans("", "", ".,:")).split()


def _image_path(root, split, name):
    return root / split / "radiology" / "images" / f"{name}.jpg"


def test_files_are_the_same_whatever_the_number_of_workers(tmp_path):
    alone = write_phantom(tmp_path / "alone", pairs=70, seed=3, workers=1)
    together = write_phantom(tmp_path / "together", pairs=70, seed=3, workers=3)
    assert _digests(alone) == _digests(together)
    other = write_phantom(tmp_path / "other", pairs=70, seed=4, workers=1)
    assert _digests(alone) != _digests(other)


def test_a_study_does_not_depend_on_the_number_of_pairs():
    few, many = sample_all(100, seed=5), sample_all(200, seed=5)
    assert few[:80] == many[:80]


def test_layout_is_that_of_roco_and_every_image_opens(phantom, sidecar):
    counts = {}
    for split in SPLITS:
        folder = phantom / split / "radiology"
        lines = (folder / "captions.txt").read_text(encoding="utf-8").splitlines()
        ids = [line.split("\t ", 1)[0] for line in lines]
        assert {f"{name}.jpg" for name in ids} == {p.name for p in (folder / "images").iterdir()}
        assert ids == [k for k, sample in sidecar["samples"].items() if sample["split"] == split]
        links = (folder / "dlinks.txt").read_text(encoding="utf-8").splitlines()
        assert [link.split("\t")[::2] for link in links] == [[k, f"{k}.jpg"] for k in ids]
        counts[split] = len(ids)
        for name in ids[:60]:
            with Image.open(_image_path(phantom, split, name)) as image:
                image.load()
                assert image.format == "JPEG"
                assert image.mode in ("L", "RGB")
                assert 128 <= min(image.size) <= 140
    assert counts == {"train": PAIRS * 8 // 10, "validation": PAIRS // 10, "test": PAIRS // 10}


@pytest.mark.parametrize("pairs", [30, 31, 47, 999])
def test_there_are_exactly_as_many_pairs_as_asked(pairs):
    samples = sample_all(pairs, seed=0)
    assert len(samples) == len({s.id for s in samples}) == pairs
    assert set(Counter(s.split for s in samples)) == set(SPLITS)


def test_a_study_lies_in_one_split_and_shows_one_case(samples):
    studies = {}
    for sample in samples:
        studies.setdefault(sample.study, []).append(sample)
    for views in studies.values():
        assert len({(view.split, view.case) for view in views}) == 1
        assert len({view.key for view in views}) == len(views) <= 2
    two_views = np.mean([len(views) == 2 for views in studies.values()])
    assert 0.2 < two_views < 0.3


def test_no_image_occurs_twice(phantom):
    digests = [d for path, d in _digests(phantom).items() if path.endswith(".jpg")]
    assert len(set(digests)) == len(digests) == PAIRS


def test_every_class_occurs_in_every_split(sidecar):
    for split in SPLITS:
        labels = [s["labels"] for s in sidecar["samples"].values() if s["split"] == split]
        for name, label_set in sidecar["label_sets"].items():
            seen = {label[name] for label in labels} - {None}
            assert seen == set(range(len(label_set["classes"]))), (split, name)
        normal = np.mean([label["side"] is None for label in labels])
        assert 0.01 < normal < 0.15


def test_many_cases_have_a_twin_that_differs_in_one_detail(samples):
    for split in SPLITS:
        families = {}
        for sample in samples:
            if sample.split == split and sample.case.finding is not None:
                families.setdefault(sample.key[:3], set()).add(sample.case)
        twins = [tuple(cases) for cases in families.values() if len(cases) == 2]
        assert len(twins) > 0.4 * len(families)
        for one, other in twins:
            assert (one.modality, one.organ) == (other.modality, other.organ)
            assert one.finding.kind == other.finding.kind
            different = [d for d in DETAILS if getattr(one.finding, d) != getattr(other.finding, d)]
            assert len(different) == 1


def test_captions_say_what_the_labels_say(samples):
    lengths, openings = [], set()
    for sample in samples:
        text = caption(sample)
        words = _words(text)
        lengths.append(len(text.split()))
        assert text[0].isupper()
        assert text.endswith(".")
        finding = sample.case.finding
        if finding is None:
            assert {"normal", "no", "without"} & set(words)
            assert not {"left", "right"} & set(words)
            continue
        openings.add(" ".join(words[:3]))
        for name in (finding.kind, finding.side, finding.size, finding.count):
            assert set(WORDS[name]) & set(words), (name, text)
        for detail, values in DETAILS.items():
            wrong = [value for value in values if value != getattr(finding, detail)]
            assert not {w for value in wrong for w in WORDS[value]} & set(words), (detail, text)
        verb = re.search(r"\b(is|are) (seen|visible)\b|\bThere (is|are)\b", text)
        if verb is not None:
            assert (finding.count == "one") == ("is" in verb.groups()), text
    assert min(lengths) >= 8
    assert max(lengths) <= 30
    assert len(openings) > 200


def test_false_captions_differ_in_the_asked_detail_alone(samples):
    # The words that may differ beside the detail's own: what agrees in number.
    agreement = {"is", "are", "a", "of", "just", "total", "separate", "in", "number"}
    nouns = {
        word
        for options in _FINDING_NOUNS.values()
        for forms in options
        for form in forms
        for word in _words(form)
    }
    for sample in samples[:1500]:
        if sample.case.finding is None:
            assert false_captions(sample) == {}
            continue
        true = Counter(_words(caption(sample)))
        for detail, false in false_captions(sample).items():
            changed = set((true - Counter(_words(false))) + (Counter(_words(false)) - true))
            own = {word for value in DETAILS[detail] for word in WORDS[value]}
            assert changed & own, (detail, false)
            allowed = own | agreement | nouns if detail == "count" else own
            assert changed <= allowed, (detail, changed, false)


def test_questions_ask_side_size_and_count_of_every_held_out_finding(phantom, sidecar):
    captions = {}
    for split in SPLITS:
        text = (phantom / split / "radiology" / "captions.txt").read_text(encoding="utf-8")
        captions |= dict(line.split("\t ", 1) for line in text.splitlines())
    expected = {
        (name, sample["split"], detail)
        for name, sample in sidecar["samples"].items()
        if sample["split"] != "train" and sample["labels"]["side"] is not None
        for detail in DETAILS
    }
    questions = sidecar["questions"]
    assert {(q["id"], q["split"], q["about"]) for q in questions} == expected
    assert len(questions) == len(expected)
    assert all(q["true"] == captions[q["id"]] != q["false"] for q in questions)


@pytest.mark.parametrize("label", CLASSES)
def test_every_class_has_its_own_prompts(label):
    per_class = prompts(label)
    assert len(per_class) == len(CLASSES[label])
    assert all(len(set(options)) == len(options) >= 4 for options in per_class)
    everything = [prompt for options in per_class for prompt in options]
    assert len(set(everything)) == len(everything)


def test_every_section_of_a_modality_is_drawn_and_nothing_else():
    named = {(modality, organ) for modality, organs in SECTIONS.items() for organ in organs}
    assert set(anatomy.ANATOMY) == named


@pytest.mark.parametrize("section", anatomy.ANATOMY.values(), ids=map("-".join, anatomy.ANATOMY))
@pytest.mark.parametrize("side", DETAILS["side"])
def test_lesions_are_on_their_side_and_apart_and_whole(section, side):
    for seed in range(12):
        canvas = Canvas(np.random.default_rng(seed), 130, 130)
        for size, (_, radius) in findings.RADII.items():
            finding = Finding("nodule", side, size, "three")
            points = centres(canvas, finding, section.zone, radius) / canvas.unit - 1
            assert np.all(points[:, 0] < 0) if side == "left" else np.all(points[:, 0] > 0)
            assert np.all(np.abs(points) + radius < 1.05)
            for one, other in itertools.combinations(points, 2):
                assert np.linalg.norm(one - other) > 2.3 * radius


def test_sizes_leave_a_gap():
    assert findings.RADII["small"][1] * 1.5 < findings.RADII["large"][0]


def test_a_finding_stands_out_on_its_side_alone():
    # The same draw with and without the finding: what changes lies on the finding's side.
    for sample in itertools.islice((s for s in sample_all(60, 2) if s.case.finding), 20):
        levels = [
            np.asarray(render(version).convert("L"), np.float32)
            for version in (sample, _mirrored(sample))
        ]
        difference = np.abs(levels[0] - levels[1])
        half = difference.shape[1] // 2
        assert difference[:, :half].max() > 40
        assert difference[:, half:].max() > 40


def _mirrored(sample):
    other = {"left": "right", "right": "left"}[sample.case.finding.side]
    return replace(
        sample, case=replace(sample.case, finding=replace(sample.case.finding, side=other))
    )


def test_mean_colour_does_not_tell_what_is_shown(phantom, sidecar):
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels = [], []
    for name, sample in sidecar["samples"].items():
        with Image.open(_image_path(phantom, sample["split"], name)) as image:
            pixels = np.asarray(image.convert("RGB"), np.float32)
        features.append(np.concatenate([pixels.mean((0, 1)), pixels.std((0, 1))]))
        labels.append([sample["labels"][label] for label in CLASSES])
    bounds = {"modality": 0.62, "organ": 0.35, "finding": 0.27}
    bounds |= {"side": 0.58, "size": 0.63, "count": 0.44}
    for label, column in zip(CLASSES, zip(*labels, strict=True), strict=True):
        known = [i for i, value in enumerate(column) if value is not None]
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
        inputs, targets = np.take(features, known, axis=0), [column[i] for i in known]
        accuracy = cross_val_score(model, inputs, targets).mean()
        assert accuracy < bounds[label], (label, accuracy)


def test_progress_counts_up_to_the_number_of_pairs(tmp_path):
    calls = []
    write_phantom(
        tmp_path / "p",
        pairs=70,
        workers=2,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(32, 70), (64, 70), (70, 70)]


def test_unknown_layout_is_refused_with_the_closest(tmp_path):
    with pytest.raises(UsageError, match="Did you mean 'roco'"):
        write_phantom(tmp_path / "p", layout="rocco")
    assert not (tmp_path / "p").exists()


def test_too_few_pairs_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"at least 30.*got 29"):
        write_phantom(tmp_path / "p", pairs=29)


@pytest.mark.parametrize("option", [{"seed": -1}, {"workers": 0}])
def test_numbers_out_of_range_are_refused(tmp_path, option):
    with pytest.raises(UsageError, match=next(iter(option))):
        write_phantom(tmp_path / "p", **option)


def test_a_folder_with_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="has files in it"):
        write_phantom(tmp_path, pairs=30)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("write", [write_phantom, cached_phantom])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, write):
    # A file in the way stops every user, root included, which permissions do not.
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="can be written"):
        write(tmp_path / "file" / "p", pairs=30)


def test_cache_is_written_once(tmp_path):
    folder = cached_phantom(tmp_path / "cache", pairs=30, seed=7, workers=1)
    assert folder == tmp_path / "cache" / f"phantom-v{GENERATOR_VERSION}-roco-30-seed7"
    (folder / "mark").write_text("")
    assert cached_phantom(tmp_path / "cache", pairs=30, seed=7, workers=1) == folder
    assert (folder / "mark").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted_write_leaves_nothing_behind(tmp_path, workers):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_phantom(tmp_path, pairs=70, workers=workers, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert len(_digests(cached_phantom(tmp_path, pairs=70, workers=workers))) == 70 + 7


def test_of_two_writers_of_one_cache_the_first_wins(tmp_path):
    def overtake(done: int, total: int) -> None:
        (folder / "theirs").mkdir(parents=True, exist_ok=True)

    folder = Path(tmp_path) / f"phantom-v{GENERATOR_VERSION}-roco-30-seed0"
    assert cached_phantom(tmp_path, pairs=30, workers=1, progress=overtake) == folder
    assert [path.name for path in folder.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [folder]


def test_an_out_that_exists_and_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    with pytest.raises(UsageError, match=r"out must be a folder that can be written; .*denied"):
        write_phantom(tmp_path, pairs=30, workers=1)
