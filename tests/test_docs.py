"""README.md and docs/ say what is true: tables, links, figures, commands, and Python that runs."""

import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

import medfast.methods
from benchmarks import report
from docs import tables
from medfast import cli, train
from medfast.data.phantom import LAYOUTS
from medfast.ops.dispatch import IMPLEMENTATIONS

PAGES = {page.relative_to(tables.ROOT).as_posix(): page.read_text() for page in tables.PAGES}
BLOCKS = {
    language: [
        (name, block)
        for name, page in PAGES.items()
        for block in re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
    ]
    for language in ("bash", "python")
}
COMMANDS = {
    line.partition(" #")[0].strip()
    for _, block in BLOCKS["bash"]
    for line in block.splitlines()
    if line.strip()
}
# Also within a sentence.
COMMANDS |= {
    " ".join(found.split())
    for page in PAGES.values()
    for found in re.findall(r"`((?:python -m|torchrun) [^`]*)`", page)
}
# What takes the words after `python -m NAME`.
PARSERS = {
    "medfast.train": cli.parse_train,
    "medfast.data": cli.parse_data,
    "medfast.evaluate": cli.parse_evaluate,
    "medfast.export": cli.parse_export,
    "medfast.profile": cli.parse_profile,
    "medfast.study": cli.parse_study,
}
# Those that read their words themselves: their flags stand in their file.
OTHERS = ("benchmarks.gpu", "benchmarks.ranks", "benchmarks.report", "docs.tables")
OTHERS += ("medfast.evals.suite.phantom",)


def _table(heading):
    """Return the rows of the table whose header line starts with `heading`."""
    page = next(page for page in PAGES.values() if f"\n| {heading}" in page)
    rows = page.partition(f"\n| {heading}")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@pytest.mark.parametrize("name", PAGES)
def test_tables_are_those_of_the_code(name):
    """After a change: python -m docs.tables."""
    assert tables.renewed(PAGES[name]) == PAGES[name]


def test_every_table_is_on_a_page():
    shown = {name for page in PAGES.values() for name in re.findall(r"<!-- table: (\w+) -->", page)}
    assert shown == set(tables.TABLES)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]):
        path, _, anchor = target.partition("#")
        there = (tables.ROOT / name).parent / path if path else tables.ROOT / name
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings
            }


def test_every_layout_of_the_phantom_is_listed():
    listed = PAGES["docs/data.md"].partition("`--layout` is that of any set")[2]
    assert re.findall(r"`(\w+)`", listed.partition(": ")[2].partition(".")[0]) == list(LAYOUTS)


def test_implementations_are_explained():
    names = [row[0].strip("`") for row in _table("`impl`")]
    assert set(names) - {"auto"} == set().union(*IMPLEMENTATIONS.values())


def test_environment_variables_are_listed():
    files = [*Path(medfast.__file__).parent.rglob("*.py"), tables.ROOT / "setup.py"]
    used = {
        name
        for path in files
        for name in re.findall(r"(?:environ.*|_VARIABLE = )\"(MEDFAST_[A-Z_]+)\"", path.read_text())
    }
    assert {row[0].strip("`") for row in _table("environment variable")} == used


def test_figures_are_those_of_the_files_that_they_name():
    """After a new run: python -m benchmarks.report --page docs/performance.md."""
    page = PAGES["docs/performance.md"]
    files = report.files_of(page)
    assert files
    assert report.renewed(page, report.page_part(files)) == page
    assert all((report.results.FOLDER / name).exists() for name in files)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_commands_are_understood(command, short_run, tmp_path):
    words = shlex.split(command)
    if words[0] == "make":
        makefile = (tables.ROOT / "Makefile").read_text()
        assert all(f"\n{target}:" in makefile for target in words[1:])
    elif words[:2] == ["git", "clone"]:
        pass
    elif words[0] == "medfast":
        assert words[1] in cli.COMMANDS
    elif words[0] in ("pip", "pytest", "source", "MEDFAST_CUDA=1", "compute-sanitizer"):
        pass
    else:
        module = next(
            word for word in words if word.startswith(("medfast.", "benchmarks.", "docs."))
        )
        before, arguments = words[: words.index(module)], words[words.index(module) + 1 :]
        assert before[-1:] == ["-m"] or (before[0] == "torchrun" and before[-2:] == ["-m", "--"])
        if module in ("medfast.evaluate", "medfast.export", "medfast.study"):
            # They look for the run and the data that a command names.
            arguments = [_there(word, short_run, tmp_path) for word in arguments]
        if module in PARSERS:
            if "--help" not in arguments:
                PARSERS[module](arguments)
        else:
            assert module in OTHERS
            path = tables.ROOT / f"{module.replace('.', '/')}.py"
            flags = [word for word in arguments if word.startswith("--")]
            assert all(f'"{flag}"' in path.read_text() for flag in flags)


def _there(word, run, folder):
    """Return a run or a folder that exists for one that a command names."""
    for name in ("roco", "bach"):
        (folder / name).mkdir(exist_ok=True)
    named = {"RUN": run, "DIR": folder, "/data/eval": folder}
    named["roco:/data/roco"] = f"roco:{folder / 'roco'}"
    return str(run if word.startswith("logs/") else named.get(word, word))


def _python(page, contains):
    return next(block for name, block in BLOCKS["python"] if name == page and contains in block)


@pytest.mark.parametrize(
    ("page", "contains"),
    [
        ("docs/losses.md", "patches = "),
        ("docs/recipes.md", "import lightning"),
        ("docs/recipes.md", "for _ in range"),
    ],
)
def test_python_runs_as_it_stands(page, contains, tmp_path):
    _run(_python(page, contains), tmp_path)


@pytest.mark.parametrize("page", ["README.md", "docs/losses.md"])
def test_losses_take_what_the_docs_give_them(page, tmp_path):
    given = (
        "import torch\nimport torch.nn.functional as F\n"
        "image_features, text_features = (F.normalize(torch.randn(4, 8), dim=-1) for _ in '12')\n"
        "query, gallery, target = image_features, text_features, torch.arange(4)\n"
        "logit_scale, logit_bias = torch.tensor(9.0), torch.tensor(-1.0)\n"
    )
    blocks = [block for name, block in BLOCKS["python"] if name == page and "patches" not in block]
    assert blocks
    _run(given + "\n".join(blocks), tmp_path)


def test_open_clips_command_trains_with_the_recipes_losses(tmp_path):
    (tmp_path / "small.json").write_text(
        '{"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, '
        '"head_width": 16, "patch_size": 16}, "text_cfg": {"context_length": 16, "vocab_size": '
        '49408, "width": 32, "heads": 2, "layers": 1}}'
    )
    (tmp_path / "pairs.csv").write_text("filepath\ttitle\n" + "picture.png\ta small nodule\n" * 4)
    from PIL import Image

    Image.new("RGB", (40, 40)).save(tmp_path / "picture.png")
    words = ["--model", "small", "--train-data", "pairs.csv", "--dataset-type", "csv"]
    words += ["--batch-size", "2", "--epochs", "1", "--workers", "0", "--precision", "fp32"]
    start = (
        f"import sys, open_clip\nopen_clip.add_model_config('small.json')\nsys.argv[1:] = {words}\n"
    )
    end = "\nimport medfast.ops\nassert 'clip_loss' in vars(medfast.ops)\n"
    _run(start + _python("docs/recipes.md", "open_clip_train") + end, tmp_path)


def test_the_example_of_a_method_trains(phantom, monkeypatch, tmp_path):
    module = types.ModuleType("medfast.methods.pulled")
    exec(_python("docs/extending.md", "class Pulled"), vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(medfast.methods.METHODS, "pulled", "Pulled")
    argv = ["--method", "pulled", "--train-data", f"roco:{phantom}", "--epochs", "1"]
    argv += ["--batch-size", "16", "--logs", str(tmp_path), "--name", "pulled"]
    train.main([*argv, "--force-image-size", "32"])
    assert '"distance"' in (tmp_path / "pulled" / "metrics.jsonl").read_text()


def _run(code, folder):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
