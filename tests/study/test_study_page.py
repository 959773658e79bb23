"""The study's page: what it shows of the numbers. test_browser.py looks at it in a browser."""

import html
import math
import re

import pytest
from study_runs import study_of, write_evaluation, write_run

from medfast.report.heat_map import MISSING, Share, heat_table
from medfast.study.folder import Record
from medfast.study.page import write_study_page
from medfast.study.plan import Run, shown
from medfast.study.report import tables
from medfast.study.results import read_outcome, with_suite

RECALLS = {
    ("clip", "scratch"): [0.20, 0.21, 0.22],
    ("clip", "general"): [0.40, 0.41, 0.42],
    ("clip", "frozen"): [0.30, 0.45, 0.48],
    ("local", "scratch"): [0.10, 0.11, 0.12],
    ("slip", "scratch"): [0.30],
}


@pytest.fixture
def page_of(tmp_path):
    """Write the page of runs with these recalls; return its source, the study and its outcomes."""

    def of(recalls, suite=(), seconds=(), settings=None, **changes):
        methods = dict.fromkeys(method for method, _ in recalls)
        study = study_of(*methods, out=tmp_path, settings=settings or {}, **changes)
        for (method, init), values in recalls.items():
            for seed, value in enumerate(values):
                place = study.runs / Run(method, init, seed).name
                write_run(place, 0.3, value, [("two_choice", "side", 0.6 + seed / 100)])
                for cell, own in dict(suite).items():
                    write_evaluation(place, *cell, own[seed], chance=0.2)
        runs = [Run(*side, seed) for side, v in recalls.items() for seed in range(len(v))]
        outcomes = with_suite(study, [read_outcome(study, run) for run in runs])
        record = Record(tmp_path / "unused", {"seconds": dict(seconds), "jobs": 1})
        path = write_study_page(tmp_path / "study.html", study, record, outcomes)
        return path.read_text(encoding="utf-8"), study, outcomes

    return of


def _text(source):
    """Return what is read of a page, with its cells and items apart."""
    body = source.partition("<main>")[2].partition("<script>")[0]
    return html.unescape(re.sub(r"<[^>]+>", "|", re.sub(r"<svg.*?</svg>", "", body, flags=re.S)))


def _table(source, label):
    """Return the cells of the table of this label, heads included."""
    part = source.partition(f'aria-label="{label}"')[2].partition("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", part)
    return [
        [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in rows
    ]


def test_questions_are_answered_by_sentence_by_table_and_by_a_picture_that_says_the_same(page_of):
    source, study, outcomes = page_of(RECALLS)
    markdown = tables(study, Record(study.out, {"seconds": {}, "jobs": 1}), outcomes)
    sentences = [line[2:] for line in markdown.splitlines() if line.startswith("- ")]
    assert len(sentences) == 4
    for sentence in sentences:
        assert sentence in _text(source)
        assert sentence in html.unescape(" ".join(re.findall(r'aria-label="([^"]*)"', source)))
    head, first, second = _table(source, "Transfer: differences in points")
    assert head == ["Difference in points", "R@1", "two-choice side"]
    half = 2.7764 * (2 / 3) ** 0.5
    assert first[1] == f"+20.0 (+{20 - half:.1f} to +{20 + half:.1f})"
    assert source.count('class="value"') == 2  # those of R@1 that leave out 0
    assert first[0] == "clip from general weights minus clip from scratch"
    assert second[0].startswith("clip from general weights, partly frozen minus")
    assert "Of 6, 0.3 would leave out 0 on average" in _text(source)


def test_a_difference_of_one_seed_has_no_interval_and_is_not_bold(page_of):
    source, _, _ = page_of(RECALLS)
    _, row = _table(source, "Unimodal: differences in points")
    assert row == ["slip from scratch minus clip from scratch", "+9.0", "-1.0"]


def test_the_heat_map_of_the_suite_has_means_over_seeds(page_of):
    suite = {
        ("bach", "zero_shot"): [0.2, 0.6, 1.0],
        ("bach", "linear_probe"): [0.9] * 3,
        ("roco", "image_to_text"): [0.5] * 3,
        ("roco", "text_to_image"): [0.7] * 3,
        ("vqa_rad", "vqa"): [0.1] * 3,
    }
    source, _, _ = page_of(RECALLS, suite)
    groups, heads, clip, *_, slip = _table(source, "The suite")
    assert groups == ["", "zero-shot classification, accuracy", "retrieval, R@10", "VQA, accuracy"]
    assert heads == ["Method", "bach", "roco", "vqa_rad"]
    assert clip == ["clip from scratch", "60.0", "60.0", "10.0"]
    assert slip == ["slip from scratch", "20.0", "60.0", "10.0"]
    part = source.partition('aria-label="The suite"')[2].partition("</table>")[0]
    # From chance, 0.2, to perfect; what is below chance has no colour.
    colours = re.findall(r"--s:([\d.]+)", part)
    assert colours[:3] == ["0.500", "0.500", "0.000"]
    assert _table(source, "Linear probes on the suite")[2] == ["clip from scratch", "90.0"]


def test_cells_of_a_heat_map_without_a_value_or_without_room_to_perfect_have_no_colour():
    rows = [("a", [Share(0.5, math.nan), Share(1.0, 1.0), MISSING])]
    source = heat_table("map", "run", rows, ["x", "y", "z"])
    assert source.count("--s:") == 1
    assert "--s:0.500" in source
    assert '<td data-sort="">\u2013</td>' in source
    assert '<td data-sort="1.0">100.0</td>' in source


def test_cost_has_speed_memory_and_the_mean_time_of_runs_and_evaluations(page_of):
    seconds = {"clip-scratch-seed0": 90.0, "clip-scratch-seed1": 110.0}
    seconds["clip-scratch-seed0.evaluation"] = 40.0
    source, _, _ = page_of(RECALLS, seconds=seconds)
    head, clip, *_, slip = _table(source, "Cost")
    assert head[2:] == [
        *("Pairs per second", "Peak memory, MB", "Seconds of training", "Seconds of evaluation"),
    ]
    assert clip == ["clip", "scratch", "100", "502", "100", "40"]
    assert slip[-2:] == ["\u2013", "\u2013"]


def test_every_run_and_every_command_is_there(page_of):
    source, study, outcomes = page_of(RECALLS)
    names = [row[0] for row in _table(source, "Runs")[1:]]
    assert names == [outcome.run.name for outcome in outcomes]
    commands = html.unescape(" ".join(re.findall(r"<code>(.*?)</code>", source)))
    for outcome in outcomes:
        assert shown(study.command(outcome.run)) in commands
    assert shown(study.whole_command()) in commands
    assert "medfast 9.8.7 (abc) with torch 6.5.4" in source


def test_without_a_question_the_page_shows_what_there_is(page_of):
    source, _, _ = page_of({("local", "scratch"): [0.2]})
    read = _text(source)
    assert read.count("Not asked:") == 3
    assert "Welch" not in read
    assert "The suite" not in read
    assert not re.search(r"\b(nan|inf|None|null)\b", read)
    assert source.count('role="img"') == 2  # recall and loss


def test_the_page_asks_for_nothing_and_foreign_text_is_never_markup(page_of):
    nasty = "<script>alert(1)</script>"
    source, _, _ = page_of(RECALLS, pretrained=nasty)
    assert nasty not in source
    assert html.escape(nasty) in source
    addresses = re.findall(r'(?:src|href)="([^"]*)"', source)
    assert all(re.match(r"data:|#|runs/[\w-]+/report.html$", address) for address in addresses)
    assert "https:" not in source
