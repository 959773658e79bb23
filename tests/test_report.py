import base64
import dataclasses
import hashlib
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medfast import train
from medfast.config import TrainConfig, resumed
from medfast.data.phantom import write_phantom
from medfast.report import AttentionExample, ContactExample, write_report
from medfast.report.curves import last_of_each_step
from medfast.report.pictures import overlay, peak

NASTY = "<script>alert(1)</script> \"q\" 'a' & 胸部 صدر\nline \x00 \ud800"
VOID = {"br", "img", "link", "meta"}


class Page(HTMLParser):
    """What a browser would make of the page, as far as the tests ask."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert {"svg", "g"} & {*self.open, tag}, f"<{tag}/> outside of SVG does not close itself"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def attributes(self, name):
        return [attrs[name] or "" for _, attrs in self.tags if name in attrs]


def _noise(size=224, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    return Image.fromarray(pixels)


def _train(step, loss, **terms):
    return {"kind": "train", "step": step, "epoch": step / 100, "loss": loss, "losses": terms}


def _validation(step, recall):
    metrics = {f"{d}_R@{k}": recall for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    chance = {metric: int(metric.partition("@")[2]) / 512 for metric in metrics}
    return {"kind": "validation", "step": step, "n": 512, "metrics": metrics, "chance": chance}


def _result(kind, value, **changes):
    metric = "text_to_image_R@1" if kind == "retrieval" else "accuracy"
    row = {
        "dataset": "phantom",
        "task": kind,
        "name": "",
        "split": "test",
        "n": 600,
        "seed": 0,
        "metrics": {metric: value},
        "chance": {metric: 0.002},
        "ci95": {metric: [value - 0.04, value + 0.04]},
        "command": "python -m medfast.train --method local",
        "medfast": "0.1.0",
        "torch": "2.14.1",
        "git": None,
    }
    return {**row, **changes}


def _write(folder, **changes):
    content = {"name": "run", "params": {}, "history": [], "results": [], **changes}
    return Page(write_report(folder / "report.html", **content).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A full report with noise for pictures, which no codec can make small."""
    weights = np.random.default_rng(0).dirichlet(np.ones(14 * 14), 14).reshape(14, 14, 14)
    return write_report(
        tmp_path_factory.mktemp("run") / "report.html",
        name="local-tiny",
        params={"method": "local", "model": "tiny", "lr": 1e-3, "tokenizer": None},
        history=[
            *(_train(step, 9 / step, clip=5 / step, local=4 / step) for step in range(1, 1001)),
            *(_validation(step, step / 2000) for step in range(100, 1001, 100)),
        ],
        results=[
            _result("two_choice", 0.7),
            _result("zero_shot", 0.9),
            _result("retrieval", 0.412),
        ],
        contact=[ContactExample(_noise(seed=i), f"caption {i}", i % 3) for i in range(24)],
        attention=[
            AttentionExample(_noise(seed=i), [f"word{j}" for j in range(14)], weights)
            for i in range(8)
        ],
        note="A stand-in.",
    )


@pytest.fixture(scope="module")
def page(report):
    return Page(report.read_text(encoding="utf-8"))


def test_page_is_html5_with_language_and_unique_ids(page):
    assert page.source.startswith("<!DOCTYPE html>\n<html lang=")
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert {href[1:] for href in page.attributes("xlink:href")} <= set(ids)


def test_every_picture_says_what_it_shows(page):
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    charts = [attrs for tag, attrs in page.tags if tag == "svg" and "aria-hidden" not in attrs]
    assert len(pictures) == 24 + 8 * (1 + 14)
    assert len(charts) == 2
    assert all(attrs["alt"] for attrs in pictures)
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in charts)


def test_page_asks_for_nothing_outside_itself(page):
    addresses = page.attributes("src") + page.attributes("href") + page.attributes("xlink:href")
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"url\((?!#)|@import|https?:", page.source)
    assert not any(tag in ("iframe", "object", "form") for tag, _ in page.tags)


def test_the_one_script_is_the_one_that_the_policy_names(page):
    scripts = re.findall(r"<script>(.*?)</script>", page.source, flags=re.DOTALL)
    assert len(scripts) == [tag for tag, _ in page.tags].count("script") == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    (policy,) = (text for text in page.attributes("content") if "default-src" in text)
    assert f"script-src 'sha256-{digest}';" in policy
    assert "default-src 'none';" in policy


def test_sections_stand_in_reading_order(page):
    sections = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert sections == ["results", "curves", "word-to-patch", "held-out", "settings", "note"]
    tasks = ("Retrieval", "Zero-shot classification", "Two-choice questions")
    places = [page.text.index(task) for task in tasks]
    assert places == sorted(places)


def test_headline_prefers_text_to_image_recall(page):
    assert "Text-to-image R@1 41.2\u00a0% of 600 (chance 0.2\u00a0%), phantom test." in page.text


def test_numbers_are_sorted_as_numbers_and_what_is_missing_is_empty(tmp_path):
    rows = [_result("zero_shot", 0.5, n=1200), _result("retrieval", 0.25, n=None)]
    page = _write(tmp_path, results=rows)
    keys = page.attributes("data-sort")
    assert {"0.5", "0.25", "1200.0", ""} <= set(keys)
    assert "nan" not in keys


def test_result_row_has_value_interval_chance_n_and_split(page):
    row = "text → image R@141.2\u00a0%37.2 to 45.2\u00a0%0.2\u00a0%600test"
    assert row in page.text


def test_pictures_of_noise_stay_below_the_size_bound(report):
    assert report.stat().st_size < 4e6


def test_foreign_text_is_shown_and_never_markup(tmp_path):
    page = _write(
        tmp_path,
        name=NASTY,
        note=NASTY,
        params={NASTY: [NASTY], "method": NASTY},
        history=[_train(1, 2.0, **{NASTY: 1.0})],
        results=[_result("zero_shot", 0.5, dataset=NASTY, name=NASTY, command=NASTY, task=NASTY)],
        contact=[ContactExample(_noise(32), NASTY, 0)],
        attention=[AttentionExample(_noise(32), [NASTY], np.full((1, 2, 2), 0.25))],
    )
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert (
        page.text.count("<script>alert(1)</script> \"q\" 'a' & 胸部 صدر\nline \ufffd \ufffd") >= 9
    )
    assert sum("<script>" in alt for alt in page.attributes("alt")) == 3


INCOMPLETE = {
    "nothing": {},
    "one point": {"history": [_train(20, 2.5, clip=2.5)]},
    "step 0 alone": {"history": [_train(0, 2.5)]},
    "one validation": {"history": [_validation(150, 0.1)]},
    "loss never finite": {"history": [_train(step, math.nan, clip=math.inf) for step in (1, 2)]},
    "loss of null": {"history": [_train(1, None, clip=None), _train(2, 3.0)]},
    "recall never finite": {"history": [_validation(1, None), _validation(2, math.nan)]},
    "train rows without keys": {"history": [{}, {"kind": "train"}, {"kind": "train", "step": 1}]},
    "validation row without keys": {"history": [{"kind": "validation", "step": 1}]},
    "one recall without chance": {
        "history": [{"kind": "validation", "step": 1, "metrics": {"text_to_image_R@1": 0.5}}]
    },
    "results without metrics": {"results": [{}, {"metrics": None}, {"metrics": {}}]},
    "results of metrics alone": {"results": [{"metrics": {"accuracy": 0.5}}]},
    "result of NaN": {"results": [_result("zero_shot", math.nan)]},
    "result of nulls": {
        "results": [_result("zero_shot", 0.5, chance=None, ci95=None, n=None, task=None)]
    },
    "interval of nulls": {"results": [_result("zero_shot", 0.5, ci95={"accuracy": [None, None]})]},
    "no share": {"results": [_result("retrieval", 0.5, metrics={"median_rank": 3.0})]},
    "weights of NaN": {
        "attention": [AttentionExample(_noise(32), ["a"], np.full((1, 2, 2), np.nan))]
    },
    "no words": {"attention": [AttentionExample(_noise(32), [], np.empty((0, 2, 2)))]},
}


@pytest.mark.parametrize("content", INCOMPLETE.values(), ids=INCOMPLETE)
@pytest.mark.filterwarnings("error")
def test_whatever_is_missing_leaves_a_sensible_page(tmp_path, content):
    shown = _write(tmp_path, **content).text
    assert not re.search(r"\b(nan|inf|None|null)\b", shown)


def test_steps_repeated_by_a_resumed_run_count_once_with_their_last_row():
    history = [_train(1, 9.0), _train(2, 8.0), _train(3, 7.0), _validation(2, 0.1)]
    history += [_train(2, 5.0), _train(3, 4.0), _validation(2, 0.3)]
    training = last_of_each_step(history, "train")
    assert [(row["step"], row["loss"]) for row in training] == [(1, 9.0), (2, 5.0), (3, 4.0)]
    assert last_of_each_step(history, "validation") == [_validation(2, 0.3)]


def test_repeated_evaluation_counts_once_with_its_last_row(tmp_path):
    text = _write(tmp_path, results=[_result("zero_shot", 0.31), _result("zero_shot", 0.62)]).text
    assert "62.0\u00a0%" in text
    assert "31.0\u00a0%" not in text


def test_steps_without_a_finite_loss_are_said(tmp_path):
    history = [_train(1, 3.0), _train(2, math.nan), _train(3, 2.0)]
    assert "Without a finite total: 1 of 3 logged steps." in _write(tmp_path, history=history).text


def test_failed_write_keeps_the_previous_report_and_leaves_nothing_beside(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("previous")

    def write_half(self, *args, **kwargs):
        self.write_bytes(b"<!DOCTYPE")
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="disk full"):
        _write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert path.read_bytes() == b"previous"


def test_overlay_glows_where_the_word_looks_and_stays_pale_where_it_does_not():
    grey = Image.new("RGB", (64, 64), (100, 100, 100))
    focal = np.zeros((4, 4))
    focal[3, 0] = 1.0  # lower left
    even = np.full((4, 4), 1 / 16)
    shift = {
        name: np.abs(np.asarray(overlay(grey, weights), dtype=float) - 100).sum(-1)
        for name, weights in {"focal": focal, "even": even}.items()
    }
    row, column = np.unravel_index(shift["focal"].argmax(), (64, 64))
    assert row >= 48
    assert column < 16
    assert shift["focal"][:24, 24:].max() < 3
    assert shift["even"].max() < shift["focal"].max() / 3
    assert peak(even) == pytest.approx(1.0)
    assert peak(focal) == 16


def test_images_of_credentialed_sets_are_shown_where_asked(tmp_path):
    data = write_phantom(tmp_path / "data", layout="mimic_cxr", pairs=60, seed=1)
    argv = ["--train-data", f"mimic_cxr:{data}", "--epochs", "1", "--batch-size", "16"]
    argv += ["--workers", "0", "--force-image-size", "32", "--logs", str(tmp_path), "--name", "a"]
    train.main([*argv, "--show-credentialed-images"])
    page = (tmp_path / "a" / "report.html").read_text()
    assert "data:image" in page
    assert "keep this file where the data may be kept" in page


def test_to_show_credentialed_images_is_no_reason_not_to_go_on():
    shown = TrainConfig(show_credentialed_images=True)
    saved = dataclasses.asdict(TrainConfig())
    given = {"show_credentialed_images"}
    assert resumed(shown, given, saved) == shown
    del saved["show_credentialed_images"]  # a run of before there was the setting
    assert resumed(TrainConfig(), set(), saved) == TrainConfig()


def test_examples_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ContactExample(_noise(8), "caption").rank = 3  # type: ignore[misc]


def test_import_is_light_and_writing_never_loads_pyplot(tmp_path):
    code = (
        "import sys, pathlib, medfast.report as report\n"
        "assert not {'torch', 'matplotlib', 'numpy', 'PIL'} & set(sys.modules)\n"
        "row = {'kind': 'train', 'step': 1, 'loss': 2.0}\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "report.write_report(path, name='run', params={}, history=[row], results=[])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "report.html"], check=True)
