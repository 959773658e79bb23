"""`medfast results`: which files are a run's, and what stands out among runs."""

import csv
import json

import pytest
from PIL import Image

from medfast import cli, json_lines
from medfast.evals.compare import compare, csv_text, markdown
from medfast.evals.compare import heat_map as draw


def _row(dataset, value, low, high, task="zero_shot", metric="accuracy", **more):
    interval = {metric: None if low is None else [low, high]}
    return {
        **{"dataset": dataset, "task": task, "name": "", "split": "test", "n": 200},
        **{"metrics": {metric: value}, "chance": {metric: 0.25}, "ci95": interval},
        **more,
    }


def _write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    json_lines.append(path, rows)
    return path


@pytest.fixture
def runs(tmp_path):
    """Run `a` with both kinds of files, run `b` with the suite's, which has one result less."""
    a, b = tmp_path / "a", tmp_path / "b"
    _write(a / "results.jsonl", _row("phantom", 0.9, 0.85, 0.95, "two_choice", name="side"))
    _write(a / "evaluations" / "bach.zero_shot.json", _row("bach", 0.7, 0.65, 0.75, model="a"))
    _write(a / "evaluations" / "sicap.zero_shot.json", _row("sicap", 0.5, 0.4, 0.6, model="a"))
    _write(b / "evaluations" / "bach.zero_shot.json", _row("bach", 0.5, 0.45, 0.55, model="b"))
    _write(b / "evaluations" / "sicap.zero_shot.json", _row("sicap", 0.55, 0.45, 0.65, model="b"))
    return a, b


def _run(*arguments):
    cli.main(["results", *map(str, arguments)])


def _table(shown):
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return cells[0], {line[0]: line[1:] for line in cells[2:]}


def test_runs_stand_side_by_side(runs, capsys):
    _run(*runs)
    shown = capsys.readouterr().out.replace("\u00a0", " ")
    head, lines = _table(shown)
    assert head == ["evaluation", "n", "chance", "a", "b"]
    # Only of bach do the intervals lie apart.
    assert lines == {
        "bach zero shot accuracy": [
            *("200", "25.0 %", "**70.0 %** (65.0 to 75.0 %)", "50.0 % (45.0 to 55.0 %)"),
        ],
        "sicap zero shot accuracy": [
            *("200", "25.0 %", "50.0 % (40.0 to 60.0 %)", "55.0 % (45.0 to 65.0 %)"),
        ],
        "phantom two choice side accuracy": [
            *("200", "25.0 %", "90.0 % (85.0 to 95.0 %)", ""),
        ],
    }
    assert "Bold: the best value of a line, if its 95 % interval lies outside" in shown
    assert "†" not in shown


def test_files_are_written_on_request(runs, tmp_path, capsys):
    files = {name: tmp_path / name for name in ("t.csv", "t.md", "t.png")}
    _run(*runs, "--csv", files["t.csv"], "--markdown", files["t.md"], "--png", files["t.png"])
    assert files["t.md"].read_text() == capsys.readouterr().out
    with files["t.csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["dataset"], row["value"], row["best"]) for row in rows] == [
        *(("a", "bach", "0.7", "yes"), ("b", "bach", "0.5", "no")),
        *(("a", "sicap", "0.5", "no"), ("b", "sicap", "0.55", "no")),
        ("a", "phantom", "0.9", "no"),
    ]
    assert (rows[0]["low"], rows[0]["high"], rows[0]["chance"]) == ("0.65", "0.75", "0.25")
    with Image.open(files["t.png"]) as image:
        assert image.format == "PNG"
        assert min(image.size) > 100
    assert not list(tmp_path.glob("*.part"))


def test_a_file_belongs_to_the_run_of_its_folder(runs, capsys):
    a, b = runs
    _run(a / "results.jsonl", *sorted((b / "evaluations").iterdir()))
    head, lines = _table(capsys.readouterr().out)
    assert head[3:] == ["a", "b"]
    assert len(lines) == 3


def test_a_folder_of_results_alone_is_a_run(tmp_path, capsys):
    _write(tmp_path / "biomed" / "bach.zero_shot.json", _row("bach", 0.7, 0.6, 0.8))
    # What else lies there is no result.
    (tmp_path / "biomed" / "other.json").write_text('{"metrics": 3}')
    _run(tmp_path / "biomed")
    head, lines = _table(capsys.readouterr().out)
    assert head[3:] == ["biomed"]
    assert list(lines) == ["bach zero shot accuracy"]


def test_models_in_one_folder_and_folders_of_one_name_are_told_apart(tmp_path, capsys):
    for folder in ("x", "y"):
        _write(tmp_path / folder / "run" / "a.json", _row("bach", 0.7, 0.6, 0.8))
    rows = [_row("bach", 0.7, 0.6, 0.8, model=f"model {k}") for k in (1, 2)]
    _write(tmp_path / "z" / "results.jsonl", *rows)
    _run(tmp_path / "x" / "run", tmp_path / "z", tmp_path / "y" / "run")
    head, _ = _table(capsys.readouterr().out)
    assert head[3:] == [
        *(str(tmp_path / "x" / "run"), "model 1", "model 2", str(tmp_path / "y" / "run")),
    ]


def _best(*of_runs, metric="accuracy", **more):
    """Return the best of runs given as (value, low, high)."""
    rows = {f"{k}": [_row("d", *x, metric=metric, **more)] for k, x in enumerate(of_runs)}
    comparison = compare(rows)
    (measure,) = comparison.values
    return comparison.best(measure)


def test_only_a_value_outside_all_other_intervals_stands_out():
    assert _best((0.7, 0.65, 0.75), (0.5, 0.45, 0.6)) == "0"
    assert _best((0.5, 0.45, 0.6), (0.7, 0.65, 0.75)) == "1"
    assert _best((0.7, 0.65, 0.75), (0.5, 0.45, 0.65)) is None  # they touch
    assert _best((0.7, 0.65, 0.75), (0.5, 0.45, 0.6), (0.69, 0.64, 0.74)) is None
    assert _best((0.7, 0.65, 0.75)) is None
    assert _best((0.7, 0.65, 0.75), (0.7, 0.65, 0.75)) is None
    # A value without an interval is neither outside nor is another outside of it.
    assert _best((0.7, None, None), (0.5, 0.45, 0.6)) is None
    assert _best((0.7, 0.65, 0.75), (0.5, None, None)) is None
    assert _best((None, None, None), (0.5, 0.45, 0.6)) is None


def test_of_ranks_and_losses_the_least_is_the_best():
    assert _best((3, 2, 4), (9, 8, 12), metric="image_to_text_median_rank") == "0"
    assert _best((9, 8, 12), (3, 2, 4), metric="loss") == "1"


@pytest.mark.parametrize("change", [{"n": 199}, {"prompts_sha256": "other"}, {"finetune": True}])
def test_runs_that_were_asked_other_things_are_marked_and_not_compared(change):
    rows = [_row("d", 0.7, 0.65, 0.75), _row("d", 0.5, 0.45, 0.55)]
    assert "**" in markdown(compare({"a": rows[:1], "b": rows[1:]}))
    shown = markdown(compare({"a": rows[:1], "b": [{**rows[1], **change}]}))
    assert "**" not in shown
    assert "| d zero shot accuracy † |" in shown
    assert "† The runs were not asked alike" in shown


def test_the_last_of_repeated_evaluations_counts():
    comparison = compare({"a": [_row("d", 0.1, 0, 0.2), _row("d", 0.9, 0.8, 1)]})
    (of_run,) = comparison.values.values()
    assert of_run["a"].value == 0.9


def _retrieval_row():
    names = ("image_to_text_R@1", "image_to_text_R@10", "text_to_image_R@1", "loss")
    return {
        **{"dataset": "roco", "task": "retrieval", "name": "", "split": "test", "n": 9},
        **{"metrics": dict.fromkeys(names, 0.5), "chance": {}, "ci95": {}},
    }


def test_metrics_are_the_main_ones_all_or_those_named():
    rows = [_retrieval_row(), _row("d", 0.5, 0.4, 0.6, "odd", "kappa"), _row("d", 0.5, 0.4, 0.6)]
    comparison = compare({"a": rows})

    def metrics(*names):
        return [measure.metric for measure in comparison.only(names).values]

    assert metrics("main") == ["image_to_text_R@1", "text_to_image_R@1", "kappa", "accuracy"]
    assert len(metrics("all")) == 6
    assert metrics("loss", "kappa") == ["loss", "kappa"]
    # The CSV is of everything.
    assert len(csv_text(comparison).splitlines()) == 7


def test_smaller_shares_of_labels_are_evaluations_of_their_own():
    row = _row("bach", 0.8, 0.7, 0.9, "linear_probe")
    row["by_fraction"] = {"0.01": {"accuracy": 0.3}, "0.1": {"accuracy": 0.5}}
    row["by_fraction_ci95"] = {"0.1": {"accuracy": [0.4, 0.6]}}
    row["by_fraction"]["1"] = {"accuracy": 0.8}
    shown = markdown(compare({"a": [row]})).replace("\u00a0", " ")
    assert "| bach linear probe accuracy | 200 | 25.0 % | 80.0 % (70.0 to 90.0 %) |" in shown
    assert "| bach linear probe 1 % of labels accuracy | 200 | 25.0 % | 30.0 % |" in shown
    ten = "| bach linear probe 10 % of labels accuracy | 200 | 25.0 % | 50.0 % (40.0 to 60.0 %) |"
    assert ten in shown
    assert shown.count("80.0 %") == 1


def test_closed_and_open_questions_have_an_n_of_their_own():
    row = _row("vqa_rad", 0.5, 0.4, 0.6, "vqa")
    row["metrics"]["accuracy_open"] = 0.25
    row["n_by"] = {"accuracy": 200, "accuracy_open": 77}
    values = compare({"a": [row]}).values
    assert {m.metric: of_run["a"].n for m, of_run in values.items()} == row["n_by"]


def test_undefined_values_are_dashes():
    shown = markdown(compare({"a|b": [_row("d", None, None, None)]}))
    assert "| a\\|b |" in shown
    assert "| \u2013 |" in shown
    assert ",,,,0.25,200,no" in csv_text(compare({"a": [_row("d", None, None, None)]}))


def test_the_heat_map_leaves_out_what_is_no_share(tmp_path):
    rows = [_row("d", 0.5, 0.4, 0.6), _row("d", 3, 2, 4, metric="median_rank"), _retrieval_row()]
    sure = {**_row("e", 1.0, 1, 1), "chance": {"accuracy": 1.0}}
    draw(compare({"a": [*rows, sure], "b": rows[:1]}), tmp_path / "one.png")
    draw(compare({"a": [rows[0], rows[2], sure], "b": rows[:1]}), tmp_path / "two.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert one.size == two.size


def _refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        _run(*arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("medfast results: error: ")
    return line


def test_mistakes_are_told_in_a_sentence(runs, tmp_path, capsys):
    a, _ = runs
    assert "none: there is no such run folder" in _refused(capsys, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "empty holds no results" in _refused(capsys, tmp_path / "empty")
    assert "RUN" in _refused(capsys)
    line = _refused(capsys, a, "--metrics", "acuracy")
    assert "Did you mean 'accuracy'?" in line
    assert "--csv" in _refused(capsys, a, "--csv", tmp_path / "no" / "t.csv")
    assert "--png" in _refused(capsys, a, "--png", tmp_path / "no" / "t.png")
    assert "is .json or .jsonl" in _refused(capsys, _write(tmp_path / "t.txt", {}))
    ranks = _write(tmp_path / "ranks" / "r.json", _row("d", 3, 2, 4, metric="median_rank"))
    assert "--png: none of the metrics" in _refused(capsys, ranks, "--png", tmp_path / "t.png")
    assert not list(tmp_path.glob("t.png*"))
    for text in ("{", "[" * 100_000):
        (a / "evaluations" / "bach.zero_shot.json").write_text(text)
        assert "bach.zero_shot.json is damaged" in _refused(capsys, a)
    other = tmp_path / "other.json"
    for strange in ({"ci95": {"x": [1, 2, 3]}}, {"n": [3]}):
        other.write_text(json.dumps({"metrics": {"x": 1}, **strange}))
        assert "not as medfast writes them" in _refused(capsys, other)


def test_a_finished_run_is_read(short_run, capsys):
    _run(short_run, "--metrics", "all")
    _, lines = _table(capsys.readouterr().out)
    assert "roco retrieval image → text R@5" in lines
    assert "roco zero shot finding accuracy" in lines
