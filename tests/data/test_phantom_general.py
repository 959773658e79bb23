"""The general domain shows what its captions say, in no medical word; the other is as before."""

import hashlib
import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from medfast.data.__main__ import main
from medfast.data.phantom import DOMAINS, LAYOUTS, cached_phantom, write_phantom
from medfast.data.phantom.canvas import Canvas
from medfast.data.phantom.cases import COUNTS, DETAILS, SIDES, SIZES, SPLITS
from medfast.data.phantom.general import caption, prompts, render, scenes, things
from medfast.data.phantom.general.captions import _COLOUR_WORDS, _SIZE_WORDS, _THING_NOUNS
from medfast.data.phantom.general.cases import CLASSES, COLOURS, SCENES, THINGS, Scene, Thing
from medfast.errors import UsageError
from medfast.evals.held_out import LABEL_SETS

PAIRS = 1200
GENERAL = DOMAINS["general"]
WORDS = {
    "side": {side: {side} for side in SIDES},
    "size": {size: set(words) for size, words in _SIZE_WORDS.items()},
    "count": {
        "one": {"single", "one", "lone"},
        "two": {"two", "pair"},
        "three": {"three", "trio"},
    },
    "colour": {colour: {w.split()[-1] for w in words} for colour, words in _COLOUR_WORDS.items()},
}
MEDICAL = """
    abdom abnormal adequate anatom artery axial bilateral biops blood bone brain breast calcif
    cancer carcin cavit cell cerebral chest clinic colon correlat crescent ct cutaneous cyst
    diagnos disease doctor examin finding flank focal foci follow-up frontal gland hand hands hemi
    histolog hospital impression intact kidney lesion lobe lung magnetic mammar mass medic mr mri
    nodul normal organ patholog patient pelvi radiograph radiolog renal scan section skin slide
    sonogram specimen spicul stain study surg symptom syndrome therap thorac thorax thyroid tissue
    tomogra transverse treatment tumor tumour ultraso unremarkable uter womb x-ray xray
"""
# Short ones are words of their own, the others begin words.
MEDICAL_WORD = re.compile(
    r"\b(" + "|".join(m + (r"\b" if len(m) < 5 else "") for m in MEDICAL.split()) + ")",
    re.IGNORECASE,
)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    folder = tmp_path_factory.mktemp("general") / "set"
    return write_phantom(folder, pairs=PAIRS, domain="general")


@pytest.fixture(scope="module")
def sidecar(phantom):
    return json.loads((phantom / "phantom.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def samples():
    return GENERAL.samples(3000, seed=1)


def _digests(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _images(root):
    return {digest for name, digest in _digests(root).items() if name.endswith(".jpg")}


def _words(text):
    return re.findall(r"[a-z]+", text.lower())


def _of_kind(noun):
    return set(_words(" ".join(form for forms in _THING_NOUNS[noun] for form in forms)))


# Digests of the texts, and the mean levels of the ninths of a picture of each modality. JPEG files
# differ with the versions of NumPy and libjpeg too, which is no change of the phantom.
MEDICAL_TEXTS = {
    "phantom.json": "379995d14f47b657",
    "test/radiology/captions.txt": "15afc7376675daa1",
    "test/radiology/dlinks.txt": "981d9bc06a0c1f28",
    "train/radiology/captions.txt": "65cbc52677d947ac",
    "train/radiology/dlinks.txt": "112decef2905aecb",
    "validation/radiology/captions.txt": "f398e5fb81e0601e",
    "validation/radiology/dlinks.txt": "336694b1ed922ff9",
}
MEDICAL_LEVELS = {
    "train/radiology/images/PHANTOM_00001.jpg": [152, 157, 156, 161, 160, 160, 156, 162, 157],
    "train/radiology/images/PHANTOM_00006.jpg": [48, 71, 57, 99, 129, 114, 58, 102, 71],
    "train/radiology/images/PHANTOM_00008.jpg": [91, 75, 90, 122, 120, 117, 103, 112, 113],
    "train/radiology/images/PHANTOM_00014.jpg": [68, 53, 63, 102, 94, 98, 89, 98, 98],
    "train/radiology/images/PHANTOM_00044.jpg": [63, 101, 54, 92, 88, 87, 80, 71, 69],
}


def test_the_medical_domain_has_not_changed(tmp_path):
    root = cached_phantom(tmp_path, pairs=60, workers=1)
    assert root.name == "phantom-v1-roco-60-seed0"
    digests = _digests(root)
    assert {name: digests[name][:16] for name in MEDICAL_TEXTS} == MEDICAL_TEXTS
    for name, expected in MEDICAL_LEVELS.items():
        with Image.open(root / name) as image:
            levels = image.convert("L").resize((3, 3), Image.Resampling.BOX)
        np.testing.assert_allclose(np.asarray(levels).ravel(), expected, atol=1, err_msg=name)


def test_files_are_the_same_whatever_the_number_of_workers(tmp_path):
    alone = write_phantom(tmp_path / "a", pairs=70, seed=3, workers=1, domain="general")
    together = write_phantom(tmp_path / "b", pairs=70, seed=3, workers=3, domain="general")
    assert _digests(alone) == _digests(together)
    other = write_phantom(tmp_path / "c", pairs=70, seed=4, workers=1, domain="general")
    assert not _images(alone) & _images(other)


def test_the_domains_share_no_image_and_no_name(tmp_path, phantom):
    medical = write_phantom(tmp_path / "medical", pairs=120)
    assert len(_images(phantom)) == PAIRS
    assert not _images(phantom) & _images(medical)
    one, other = (domain.samples(1000, seed=0) for domain in DOMAINS.values())
    for name in ("id", "study", "key"):
        assert not {getattr(s, name) for s in one} & {getattr(s, name) for s in other}
    for layout in LAYOUTS.values():
        for place in (layout.key, layout.image):
            assert not {place(s) for s in one} & {place(s) for s in other}


def test_the_cache_keeps_the_domains_apart(tmp_path):
    folder = cached_phantom(tmp_path, pairs=30, workers=1, domain="general")
    assert folder.name == f"phantom-general-v{GENERAL.version}-roco-30-seed0"
    assert json.loads((folder / "phantom.json").read_text())["generator"] == (
        "medfast phantom-general"
    )


def test_every_class_occurs_in_every_split(sidecar):
    for split in SPLITS:
        labels = [s["labels"] for s in sidecar["samples"].values() if s["split"] == split]
        for name, label_set in sidecar["label_sets"].items():
            seen = {label[name] for label in labels} - {None}
            assert seen == set(range(len(label_set["classes"]))), (split, name)


def test_what_is_asked_zero_shot_has_an_answer_for_every_image(sidecar):
    assert set(LABEL_SETS) <= set(sidecar["label_sets"])
    for sample in sidecar["samples"].values():
        assert all(sample["labels"][name] is not None for name in LABEL_SETS)
    assert sidecar["label_sets"]["modality"]["classes"] == list(SCENES)


def test_captions_say_what_the_labels_say(samples):
    openings, told = set(), []
    for sample in samples:
        text, scene = caption(sample), sample.case
        words = set(_words(text))
        assert text[0].isupper()
        assert text.endswith(".")
        assert 4 <= len(text.split()) <= 35
        openings.add(" ".join(text.split()[:3]))
        if scene.finding is None:
            assert words & {"nothing", "empty", "without"}
            assert not words & {"left", "right"}
            continue
        assert words & _of_kind(scene.finding.kind), text
        for detail, values in WORDS.items():
            own = values[getattr(scene.finding, detail)]
            others = set().union(*values.values()) - own
            assert not words & others, (detail, text)
            assert not (detail == "colour" and scene.grey and words & own), text
        told.append({d: bool(words & WORDS[d][getattr(scene.finding, d)]) for d in WORDS})
        verb = re.search(r"\b(is|are) (a|one|two|three|visible)\b", text)
        if verb is not None:
            assert (verb[1] == "is") == (scene.finding.count == "one"), text
    assert len(openings) > 200
    shares = {detail: np.mean([t[detail] for t in told]) for detail in WORDS}
    assert shares["count"] == 1
    assert 0.85 < shares["side"] < 0.95
    assert 0.92 < shares["size"] < 0.98
    assert 0.6 < shares["colour"] < 0.8


def test_no_medical_word_is_in_a_caption_or_a_prompt(samples):
    texts = {caption(sample) for sample in samples}
    texts |= {prompt for label in CLASSES for options in prompts(label) for prompt in options}
    assert [text for text in texts if MEDICAL_WORD.search(text)] == []
    assert all(MEDICAL_WORD.search(DOMAINS["medical"].caption(s)) for s in _medical(300))


def _medical(pairs):
    return DOMAINS["medical"].samples(pairs, seed=0)


def test_false_captions_differ_in_the_asked_detail_alone(samples):
    # The words that may differ beside the detail's own: what agrees in number.
    agreement = {"is", "are", "a", "of", "just", "total", "separate"}
    asked = Counter()
    for sample in samples[:1500]:
        finding = sample.case.finding
        found = GENERAL.false_captions(sample)
        asked.update(found.keys())
        true = Counter(_words(caption(sample)))
        for detail, false in found.items():
            wrong = Counter(_words(false))
            changed = set((true - wrong) + (wrong - true))
            own = set().union(*WORDS[detail].values())
            nouns = _of_kind(finding.kind) | agreement if detail == "count" else set()
            assert changed & own, (detail, false)
            assert changed <= own | nouns, (detail, changed, false)
    assert set(asked) == set(DETAILS)


def test_questions_are_about_what_the_caption_tells(phantom, sidecar):
    captions = {}
    for split in SPLITS:
        text = (phantom / split / "radiology" / "captions.txt").read_text(encoding="utf-8")
        captions |= dict(line.split("\t ", 1) for line in text.splitlines())
    questions = sidecar["questions"]
    assert all(q["true"] == captions[q["id"]] != q["false"] for q in questions)
    for q in questions:
        told = set().union(*WORDS[q["about"]].values())
        assert told & set(_words(q["true"])), q
    held_out = [
        s for s in sidecar["samples"].values() if s["split"] != "train" and s["labels"]["side"] == 0
    ]
    assert len(questions) > 4 * len(held_out)


@pytest.mark.parametrize("label", CLASSES)
def test_every_class_has_its_own_prompts(label):
    per_class = prompts(label)
    assert len(per_class) == len(CLASSES[label])
    assert all(len(set(options)) == len(options) >= 4 for options in per_class)
    everything = [prompt for options in per_class for prompt in options]
    assert len(set(everything)) == len(everything)


def test_every_scene_and_thing_is_drawn_and_nothing_else():
    assert set(scenes._BACKGROUNDS) == set(SCENES)
    assert set(things._DRAWINGS) == set(THINGS)
    assert set(things.PAINTS) == set(COLOURS)


def test_sizes_leave_a_gap():
    assert things.RADII["small"][1] * 1.5 < things.RADII["large"][0]


# Colours as angles round the colour wheel.
HUES = {"red": 0, "orange": 29, "yellow": 52, "green": 133, "blue": 225, "purple": 283}


def _hues(pixels):
    """Return the hue of colours [3, N] in degrees, and how strong it is."""
    red, green, blue = pixels
    x, y = red - 0.5 * (green + blue), 0.75**0.5 * (green - blue)
    return np.degrees(np.arctan2(y, x)) % 360, np.hypot(x, y)


@pytest.mark.parametrize("kind", THINGS)
@pytest.mark.parametrize("size", SIZES)
def test_things_are_as_many_as_the_label_says_in_its_colour_on_its_side(kind, size):
    areas = []
    for seed in range(24):
        rng = np.random.default_rng(seed)
        thing = Thing(kind, SIDES[seed % 2], size, COUNTS[seed % 3], COLOURS[seed % 6])
        where = THINGS[kind][seed % len(THINGS[kind])]
        scene = Scene(where, thing, SCENES[where][seed % 3], False)
        canvas = Canvas(rng, 134, 134, colour=True, wobble=0.012)
        scenes.draw(canvas, scene)
        before = canvas.value.copy()
        things.draw(canvas, thing, scenes.zone(scene))
        # Strong changes alone: shadows are faint.
        drawn = np.abs(canvas.value - before).max(axis=0) > 0.12
        parts, found = ndimage.label(ndimage.binary_closing(drawn))
        sizes = ndimage.sum_labels(drawn, parts, range(1, found + 1))
        whole = np.flatnonzero(sizes > 0.3 * sizes.max()) + 1
        assert len(whole) == COUNTS.index(thing.count) + 1, (seed, scene)
        for _, x in ndimage.center_of_mass(drawn, parts, whole):
            assert (x < 67) == (thing.side == "left"), (seed, scene)
        hue, strength = _hues(canvas.value[:, drawn])
        away = [np.abs((hue - angle + 180) % 360 - 180) for angle in HUES.values()]
        nearest = np.argmin(away, axis=0)[strength > 0.2]
        assert Counter(nearest.tolist()).most_common(1)[0][0] == seed % 6, (seed, scene)
        areas.append(drawn.sum() / len(whole))
    radius = np.mean(things.RADII[size]) * 67
    assert 0.2 * np.pi * radius**2 < np.median(areas) < 1.3 * np.pi * radius**2


def test_grey_photographs_have_no_colour(samples):
    grey = [s for s in samples if s.case.grey][:12]
    coloured = [s for s in samples if not s.case.grey][:12]
    assert {render(s).mode for s in grey} == {"L", "RGB"}
    for photographs, limit in ((grey, 0), (coloured, 10)):
        for sample in photographs:
            pixels = np.asarray(render(sample).convert("RGB")).astype(int)
            assert (np.ptp(pixels, axis=-1).mean() > limit) == (not sample.case.grey)


def test_an_unknown_domain_is_refused_with_the_closest(tmp_path):
    for write in (write_phantom, cached_phantom):
        with pytest.raises(UsageError, match=r"domain 'generall'.*Did you mean 'general'"):
            write(tmp_path / "p", domain="generall")
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("layout", ["mimic_cxr", "mimic_cxr_dicom"])
def test_reports_of_radiographs_are_refused_in_the_general_domain(tmp_path, layout):
    with pytest.raises(UsageError, match=rf"{layout} holds the medical domain alone.*general"):
        write_phantom(tmp_path / "p", layout=layout, domain="general")
    assert not (tmp_path / "p").exists()


def test_the_command_writes_either_domain(tmp_path, capsys):
    command = ["phantom", "--layout", "csv", "--pairs", "30", "--out"]
    main([*command, str(tmp_path / "g"), "--domain", "general"])
    main([*command, str(tmp_path / "m")])
    assert f"--train-data csv:{tmp_path / 'g'}" in capsys.readouterr().out
    generators = [
        json.loads((tmp_path / d / "phantom.json").read_text())["generator"] for d in "gm"
    ]
    assert generators == ["medfast phantom-general", "medfast phantom"]
    with pytest.raises(SystemExit, match="2"):
        main([*command, str(tmp_path / "x"), "--domain", "medica"])
    assert "Did you mean 'medical'" in capsys.readouterr().err
