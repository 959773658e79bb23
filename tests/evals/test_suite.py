"""The suite's tasks: what goes into each number, what is cached, and what means count."""

import csv
import io
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from medfast import json_lines
from medfast.data import read_split
from medfast.data.classification import read, read_splits
from medfast.data.loader import Loader
from medfast.data.phantom import write_phantom
from medfast.data.phantom.classification import write_classification
from medfast.data.skipped import SkippedSamples
from medfast.data.sources import AbsentError
from medfast.errors import UsageError
from medfast.evals.cache import FeatureCache, Frozen, weights_hash
from medfast.evals.models import load_encoder
from medfast.evals.prompts import prompt_hash, prompts
from medfast.evals.suite import EVALUATIONS, TASKS, about, cells, folder, overlaps, tasks
from medfast.evals.suite.pictures import confusion_picture, heat_map
from medfast.evals.suite.tables import (
    CSV_COLUMNS,
    classes_csv,
    in_means,
    results_csv,
    results_markdown,
)
from medfast.evals.zero_shot import zero_shot_metrics

CPU = torch.device("cpu")
KEY = "pad_ufes_20"


@pytest.fixture(scope="module")
def encoder(short_run):
    return load_encoder(str(short_run), CPU, "fp32")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A classification set of six classes with patients. Read only."""
    return write_classification(tmp_path_factory.mktemp("labelled"), KEY, per_class=10)


@pytest.fixture
def using(encoder, tmp_path):
    return tasks.Using(
        encoder=encoder,
        cache=FeatureCache(tmp_path / "features", {"model": weights_hash(encoder.model)}),
        skipped=SkippedSamples(tmp_path / "skipped.jsonl", 1, math.inf),
    )


def _results(root, using, asked=TASKS["classification"]):
    return {row["task"]: row for row in tasks.evaluate(KEY, root, asked, using)}


def _features(encoder, records):
    (batch,) = Loader(records, encoder.tokenizer, encoder.image_size, len(records)).epoch(0)
    return encoder.images(batch.images)


def test_there_are_25_data_sets_and_48_cells():
    kinds = list(EVALUATIONS.values())
    assert [kinds.count(kind) for kind in TASKS] == [20, 3, 2]
    assert len(set(cells())) == len(cells()) == 48
    assert cells(["roco", "bach"]) == [
        *(("bach", "zero_shot"), ("bach", "linear_probe")),
        *(("roco", "image_to_text"), ("roco", "text_to_image")),
    ]


def test_every_data_set_says_what_it_is_and_overlaps_are_mutual():
    for key in EVALUATIONS:
        assert about(key).key == key
        assert about(key).licence
        assert folder(key)
        assert all(key in overlaps(other) for other in overlaps(key))
    assert overlaps("pathmnist") == ("nct_crc",)
    assert overlaps("dermamnist") == ("ham10000",)


def test_zero_shot_numbers_follow_from_the_embeddings(labelled, encoder, using):
    row = _results(labelled, using, ["zero_shot"])["zero_shot"]
    split = read(KEY, labelled, "test")
    images = _features(encoder, split.samples).unit
    asked = prompts(KEY)
    means = [F.normalize(encoder.texts(own).unit.mean(0), dim=0) for own in asked]
    scores = images @ torch.stack(means).T
    right = scores.argmax(1).numpy() == split.labels
    assert row["metrics"]["accuracy"] == pytest.approx(right.mean())
    best = scores.topk(5).indices.tolist()
    top5 = [label in own for label, own in zip(split.labels, best, strict=True)]
    assert row["metrics"]["top5_accuracy"] == pytest.approx(np.mean(top5))
    chances = (scores.double() * encoder.model.logit_scale.exp().double()).softmax(1)
    table = np.array(row["confusion"])
    assert table.sum() == row["n"] == len(split)
    assert np.trace(table) == right.sum()
    aurocs = []
    for k in set(split.labels.tolist()):
        positive, negative = chances[split.labels == k, k], chances[split.labels != k, k]
        difference = positive[:, None] - negative
        aurocs.append(((difference > 0) + 0.5 * (difference == 0)).mean().item())
    assert row["metrics"]["macro_auroc"] == pytest.approx(np.mean(aurocs))
    assert row["prompts_sha256"] == prompt_hash(asked)
    assert row["ci95_by"] == "patient"
    assert row["skipped"] == {"test": 0}
    assert [own["class"] for own in row["per_class"]] == list(split.classes)


@pytest.mark.parametrize(("scale", "auroc"), [(1.0, 1.0), (100.0, 0.0)])
def test_zero_shot_probabilities_take_the_scale(scale, auroc):
    """Class 0 gets 0.45 and 0.38 at a scale of 1, and 0.5 and 1.0 at a scale of 100."""
    scores = torch.tensor([[0.5, 0.5, -1.0], [0.5, 0.3, 0.3]])
    found = zero_shot_metrics(scores, scale, [0, 1], [0, 1])
    assert found["per_class"][0]["auroc"] == auroc


def test_prompts_are_those_that_are_asked_for(labelled, using):
    other = _results(labelled, replace(using, prompts="histology4"), ["zero_shot"])["zero_shot"]
    assert other["prompts"] == "histology4"
    assert other["prompts_sha256"] == prompt_hash(prompts(KEY, "histology4"))


def test_the_probe_reports_every_share_of_the_labels(labelled, using):
    row = _results(labelled, using, ["linear_probe"])["linear_probe"]
    asked = [(run["fraction"], run["seed"]) for run in row["runs"]]
    assert asked == [*((0.01, s) for s in range(3)), *((0.1, s) for s in range(3)), (1.0, 0)]
    assert row["metrics"] == row["runs"][-1]["metrics"] == row["by_fraction"]["1"]
    ten = row["runs"][3:6]
    for name, mean in row["by_fraction"]["0.1"].items():
        assert mean == pytest.approx(np.mean([run["metrics"][name] for run in ten]))
        low, high = row["by_fraction_ci95"]["0.1"][name]
        assert low <= mean <= high
    assert row["by_fraction_ci95"]["1"] == row["ci95"]
    sizes = {name: len(split) for name, split in read_splits(KEY, labelled).items()}
    assert row["runs"][-1]["n_train"] == sizes["train"]
    assert row["n"] == sizes["test"]
    assert row["skipped"] == {"train": 0, "validation": 0, "test": 0}


def test_nothing_of_the_test_split_reaches_the_probe(labelled, using, tmp_path):
    """Other pixels in every test image change no fit and no choice, only the test figures."""
    before = _results(labelled, using, ["linear_probe"])["linear_probe"]
    own = tmp_path / "own"
    shutil.copytree(labelled, own)
    rng = np.random.default_rng(0)
    for record in read(KEY, own, "test").samples:
        noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(record.image)
    after = _results(own, using, ["linear_probe"])["linear_probe"]
    fit = ("n_train", "C", "validation_accuracy", "gradient_norm", "iterations")
    assert [[run[name] for name in fit] for run in before["runs"]] == [
        [run[name] for name in fit] for run in after["runs"]
    ]
    assert before["per_class"] != after["per_class"]


def test_late_interaction_is_scored_by_patches_and_probed_by_their_mean(
    labelled, encoder, using, monkeypatch
):
    late = replace(encoder, late_interaction=True)
    late_using = replace(using, encoder=late, batch_size=4)
    probed = {}
    real = tasks.linear_probe

    def probe(train, *rest, **options):
        probed["train"] = train
        return real(train, *rest, **options)

    monkeypatch.setattr(tasks, "linear_probe", probe)
    rows = _results(labelled, late_using)
    split = read(KEY, labelled, "test")
    patches = _features(late, split.samples)
    classes = [late.texts(own) for own in prompts(KEY)]
    right = patches.class_scores(classes).argmax(1).numpy() == split.labels
    assert rows["zero_shot"]["metrics"]["accuracy"] == pytest.approx(right.mean())
    train = _features(late, read(KEY, labelled, "train").samples)
    torch.testing.assert_close(probed["train"].features, train.unit.mean(1))
    assert rows["linear_probe"]["features"] == "mean of unit patch features"


def test_a_broken_image_is_skipped_counted_and_listed(labelled, using, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(labelled, own)
    broken = read(KEY, own, "test").samples[0].image
    whole = _results(own, using)
    broken.write_bytes(broken.read_bytes()[:200])
    # The second time features come from the cache, what is wrong with the image too.
    for name in ("first.jsonl", "second.jsonl"):
        listing = SkippedSamples(tmp_path / name, 1, math.inf)
        rows = _results(own, replace(using, skipped=listing))
        assert rows["zero_shot"]["skipped"] == {"test": 1}
        assert rows["linear_probe"]["skipped"] == {"train": 0, "validation": 0, "test": 1}
        for task, row in rows.items():
            assert row["n"] == whole[task]["n"] - 1
        assert [row["path"] for row in json_lines.read(tmp_path / name)] == [str(broken)]


def test_retrieval_intervals_are_over_patients_or_else_studies(using, tmp_path, monkeypatch):
    drawn = []
    real = tasks.retrieval_figures

    def figures(embeddings, captions, images, groups, **options):
        drawn.append(groups)
        return real(embeddings, captions, images, groups, **options)

    monkeypatch.setattr(tasks, "retrieval_figures", figures)
    for key, kind in (("mimic_cxr", "patient"), ("roco", "study")):
        root = write_phantom(tmp_path / key, layout=key, pairs=60)
        (row,) = tasks.evaluate(key, root, ["image_to_text"], using)
        assert row["ci95_by"] == kind
        records = read_split(key, root, "test").records
        assert drawn[-1] == [record.origin or f"study {record.study}" for record in records]


def test_who_has_the_test_images_alone_gets_zero_shot_figures(using, tmp_path):
    root = write_classification(tmp_path / "nct", "nct_crc", per_class=10)
    shutil.rmtree(root / "NCT-CRC-HE-100K")
    results = tasks.evaluate("nct_crc", root, TASKS["classification"], using)
    assert next(results)["task"] == "zero_shot"
    with pytest.raises(AbsentError, match=r"lacks .*NCT-CRC-HE-100K"):
        next(results)


def test_a_split_without_a_readable_image_is_refused(labelled, using, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(labelled, own)
    for record in read(KEY, own, "test").samples:
        record.image.write_bytes(f"no image {record.key}".encode())
    with pytest.raises(UsageError, match="test images: none of the 10 can be read"):
        _results(own, using, ["zero_shot"])


class TestCache:
    @pytest.fixture
    def records(self, labelled):
        return read(KEY, labelled, "test").samples

    @pytest.fixture
    def kept(self, records):
        features = torch.randn(len(records), 4, generator=torch.Generator().manual_seed(0))
        return Frozen(features, torch.arange(len(records)), ())

    def test_features_are_computed_once(self, records, kept, tmp_path):
        FeatureCache(tmp_path, {"model": "a"}).get(records, lambda: kept)
        again = FeatureCache(tmp_path, {"model": "a"}).get(records, self._fail)
        torch.testing.assert_close(again.features, kept.features, rtol=0, atol=0)
        assert again.index.tolist() == kept.index.tolist()
        assert not list(tmp_path.glob("*.part"))

    def test_another_model_image_or_order_has_other_features(self, labelled, kept, tmp_path):
        own = tmp_path / "own"
        shutil.copytree(labelled, own)
        records = read(KEY, own, "test").samples
        cache = FeatureCache(tmp_path, {"model": "a"})
        cache.get(records, lambda: kept)
        # Folders may move.
        cache.get(read(KEY, labelled, "test").samples, self._fail)
        for change in (
            lambda: FeatureCache(tmp_path, {"model": "b"}).get(records, self._fail),
            lambda: cache.get(records[::-1], self._fail),
            lambda: self._changed(records[0].image, tmp_path).get(records, self._fail),
        ):
            with pytest.raises(ZeroDivisionError):
                change()

    def test_a_damaged_file_is_computed_again(self, records, kept, tmp_path, caplog):
        cache = FeatureCache(tmp_path, {})
        cache.get(records, lambda: kept)
        (file,) = tmp_path.glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:-8])
        with caplog.at_level("WARNING", "medfast"):
            cache.get(records, lambda: kept)
        FeatureCache(tmp_path, {}).get(records, self._fail)

    def test_a_folder_that_cannot_be_written_costs_only_time(self, records, kept, tmp_path):
        (tmp_path / "file").touch()
        cache = FeatureCache(tmp_path / "file", {})
        assert cache.get(records, lambda: kept) is kept

    def test_weights_tell_models_apart(self):
        model = torch.nn.Linear(2, 2)
        before = weights_hash(model)
        assert weights_hash(model) == before
        with torch.no_grad():
            model.bias[0] += 1
        assert weights_hash(model) != before

    def _changed(self, image, folder):
        image.write_bytes(image.read_bytes()[:-1] + b"\x01")
        return FeatureCache(folder, {"model": "a"})

    def _fail(self):
        return 1 / 0


def _row(dataset, task, value, **more):
    metric = {"image_to_text": "R@1", "text_to_image": "R@1"}.get(task, "accuracy")
    return {
        **{
            "suite": "medical25",
            "model": "m",
            "dataset": dataset,
            "task": task,
            "split": "test",
            "n": 10,
            "seed": 0,
        },
        **{"metrics": {metric: value}, "chance": {metric: 0.1}, "ci95": {metric: [0.0, 1.0]}},
        **{"skipped": {"test": 0}, "notes": [], **more},
    }


def test_means_count_sets_with_the_same_images_once():
    rows = [
        _row("nct_crc", "zero_shot", 0.2),
        _row("pathmnist", "zero_shot", 0.8),
        _row("bach", "zero_shot", 0.4),
        # Alone, it counts.
        _row("dermamnist", "zero_shot", 0.6),
    ]
    counted = {("nct_crc", "zero_shot"), ("bach", "zero_shot"), ("dermamnist", "zero_shot")}
    assert in_means(rows) == counted
    text = results_markdown(rows, {}, {})
    mean = next(line for line in text.splitlines() if line.startswith("| mean"))
    assert mean.strip("|").split("|")[3].strip() == "40.0 (3)"
    assert "- Mean over nct_crc, bach, dermamnist: zero_shot accuracy." in text
    assert "- pathmnist: in no mean of zero_shot, as nct_crc is there too." in text
    assert "| pathmnist (as nct_crc) | 10 | 10.0 | 80.0 (0.0 to 100.0) |" in text


def test_means_say_over_what_where_tasks_differ():
    probe = _row("bach", "linear_probe", 0.9, runs=[], by_fraction={"1": {"accuracy": 0.9}})
    rows = [_row("bach", "zero_shot", 0.4), probe, _row("pcam", "zero_shot", None)]
    text = results_markdown(rows, {}, {})
    assert "- Mean over bach: zero_shot accuracy, linear_probe accuracy 1." in text
    # What is undefined is in no mean.
    assert next(line for line in text.splitlines() if line.startswith("| mean")).count("(1)") == 2


def test_tables_tell_what_was_skipped_what_failed_and_what_is_missing():
    rows = [
        _row("roco", "image_to_text", 0.5, skipped={"test": 3}, notes=["a note"]),
        _row("sicap", "zero_shot", 0.5, skipped={"test": 1}),
    ]
    text = results_markdown(rows, {"bach": "bach: Get it."}, {"pcam": "It broke."})
    for line in (
        "- roco: a note.",
        "- roco: image_to_text: 3 samples could not be used.",
        "- sicap: zero_shot: 1 sample could not be used.",
        "- bach: Get it.",
        "- pcam: It broke. The traceback is in pcam.error.txt.",
    ):
        assert line in text.splitlines()


def test_the_table_tells_which_sets_were_asked_in_another_way():
    rows = [
        _row("bach", "zero_shot", 0.5, prompts="default"),
        _row("sicap", "zero_shot", 0.5, prompts="histology4"),
        _row("vqa_rad", "vqa", 0.5, finetune=False),
        _row("path_vqa", "vqa", 0.5, finetune=True),
    ]
    text = results_markdown(rows, {}, {})
    assert "- sicap: zero_shot: asked with the prompts histology4." in text
    assert "- path_vqa: vqa: the towers were trained too." in text
    assert text.count("asked with") == text.count("trained too") == 1


def test_closed_and_open_questions_have_an_n_of_their_own():
    n_by = {"accuracy": 1200, "accuracy_closed": 1100, "accuracy_open": 100}
    row = _row("vqa_rad", "vqa", 0.5, n=1200, n_by=n_by)
    row["metrics"] = dict.fromkeys(n_by, 0.5)
    assert "| vqa_rad | 1,200 (1,100 closed, 100 open) |" in results_markdown([row], {}, {})
    lines = csv.DictReader(io.StringIO(results_csv([row])))
    assert {line["metric"]: int(line["n"]) for line in lines} == n_by


def test_a_probe_that_has_not_converged_is_told():
    row = _row("bach", "linear_probe", 0.9, by_fraction={"1": {"accuracy": 0.9}})
    for converged in (True, False):
        text = results_markdown([{**row, "runs": [{"converged": converged}]}], {}, {})
        assert ("has not converged" in text) != converged


def test_csv_has_a_line_for_each_part_and_metric():
    rows = [
        _row(
            "bach",
            "linear_probe",
            0.9,
            by_fraction={"0.1": {"accuracy": 0.7}, "1": {"accuracy": 0.9}},
            by_fraction_ci95={"0.1": {"accuracy": [0.6, 0.8]}, "1": {"accuracy": [0.0, 1.0]}},
        ),
        _row(
            "vqa_rad",
            "vqa",
            0.5,
            baselines={"majority": {"metrics": {"accuracy": 0.3}, "ci95": {}}},
        ),
        _row("pathmnist", "zero_shot", None),
        _row("nct_crc", "zero_shot", 0.2),
    ]
    lines = list(csv.reader(io.StringIO(results_csv(rows))))
    assert lines[0] == list(CSV_COLUMNS)
    assert [line[:4] + line[6:] for line in lines[1:]] == [
        ["m", "bach", "linear_probe", "0.1", "accuracy", "0.7", "0.6", "0.8", "0.1", "yes", "0"],
        ["m", "bach", "linear_probe", "1", "accuracy", "0.9", "0.0", "1.0", "0.1", "yes", "0"],
        ["m", "vqa_rad", "vqa", "", "accuracy", "0.5", "0.0", "1.0", "0.1", "yes", "0"],
        ["m", "vqa_rad", "vqa", "majority", "accuracy", "0.3", "", "", "0.1", "yes", "0"],
        ["m", "pathmnist", "zero_shot", "", "accuracy", "", "0.0", "1.0", "0.1", "no", "0"],
        ["m", "nct_crc", "zero_shot", "", "accuracy", "0.2", "0.0", "1.0", "0.1", "yes", "0"],
    ]


def test_every_class_has_a_line():
    of_class = [
        {"class": "a, b", "n": 3, "precision": None, "recall": 0.0, "f1": 0.0, "auroc": 0.5},
        {"class": "c", "n": 1, "precision": 0.25, "recall": 1.0, "f1": 0.4, "auroc": 0.75},
    ]
    rows = [_row("bach", "zero_shot", 0.5, per_class=of_class), _row("roco", "image_to_text", 0.5)]
    assert list(csv.reader(io.StringIO(classes_csv(rows)))) == [
        ["model", "dataset", "task", "split", "class", "n", "precision", "recall", "f1", "auroc"],
        ["m", "bach", "zero_shot", "test", "a, b", "3", "", "0.0", "0.0", "0.5"],
        ["m", "bach", "zero_shot", "test", "c", "1", "0.25", "1.0", "0.4", "0.75"],
    ]


def test_pictures_are_drawn_also_of_undefined_numbers(tmp_path):
    rows = [_row("bach", "zero_shot", None), _row("roco", "image_to_text", 0.5)]
    heat_map(rows, tmp_path / "map.png")
    counts = [[3, 1], [0, 0]]
    named = [{"class": "a"}, {"class": "b" * 60}]
    row = _row("bach", "zero_shot", 0.7, confusion=counts, per_class=named)
    confusion_picture(row, tmp_path / "confusion.png")
    for name in ("map.png", "confusion.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 100
            assert len(image.convert("RGB").getcolors(2**20)) > 10
    assert not list(tmp_path.glob("*.part"))
