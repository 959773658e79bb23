"""The README says what is true: its tables and its commands."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import report
from medfast import cli
from medfast.data import SOURCES
from medfast.data.phantom import LAYOUTS
from medfast.methods import METHODS
from medfast.ops.dispatch import IMPLEMENTATIONS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]


def _table(heading):
    """Return the rows of the table whose header line starts with `heading`."""
    rows = README.partition(f"\n| {heading}")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_every_method_is_listed():
    assert [row[0].strip("`") for row in _table("`--method`")] == list(METHODS)


def test_every_source_is_listed_with_its_licence_and_access():
    expected = []
    for source, module in SOURCES.items():
        about = importlib.import_module(module).ABOUT
        if source == about.key:
            expected.append([f"`{source}`", about.title, about.licence, about.access])
    assert _table("`--train-data`") == expected


def test_every_layout_of_the_phantom_is_listed():
    listed = README.partition("`--layout` is that of any set below: ")[2].partition(".")[0]
    assert re.findall(r"`(\w+)`", listed) == list(LAYOUTS)


def test_implementations_are_those_of_the_table():
    names = [row[0].strip("`") for row in _table("`impl`")]
    assert set(names) - {"auto"} == set().union(*IMPLEMENTATIONS.values())
    header = re.search(r"\| function \|(.*)\|", README).group(1)
    columns = [cell.strip(" `") for cell in header.split("|")]
    rows = {row[0].partition(",")[0].strip("`"): row[1:] for row in _table("function")}
    assert rows.keys() == IMPLEMENTATIONS.keys()
    for op, cells in rows.items():
        listed = [name for name, cell in zip(columns, cells, strict=True) if cell == "yes"]
        assert listed == list(IMPLEMENTATIONS[op])


@pytest.mark.parametrize("command", [c for c in COMMANDS if "medfast.train" in c])
def test_train_commands_parse(command):
    program, _, arguments = command.partition("medfast.train")
    assert program == "python -m " or re.fullmatch(r"torchrun .*-m -- ", program)
    if "--help" not in arguments:
        cli.parse_train(shlex.split(arguments))


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_targets_exist(command):
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    assert f"\n{command.split()[1]}:" in makefile


def test_environment_variables_are_listed():
    package = Path(cli.__file__).parent
    used = set()
    for path in package.rglob("*.py"):
        used |= set(re.findall(r"MEDFAST_[A-Z_]+", path.read_text()))
    assert {row[0].strip("`") for row in _table("environment variable")} == used


def test_figures_are_those_of_the_files_that_they_name():
    """After a new run: python -m benchmarks.report --readme README.md."""
    files = report.files_of(README)
    assert files
    assert report.renewed(README, report.readme_part(files)) == README
    assert all((report.results.FOLDER / name).exists() for name in files)
