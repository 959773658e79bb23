"""The command line of `medfast study`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medfast.cli.commands import COMMANDS
from medfast.cli.evaluate import add_places, parse_evaluate
from medfast.cli.parser import Parser
from medfast.cli.settings import read_config
from medfast.config import TrainConfig
from medfast.errors import UsageError, unknown_name
from medfast.evals.suite import EVALUATIONS, folder
from medfast.methods import METHODS
from medfast.study.plan import BUDGETS, OWN_SETTINGS, SUITE_DATA, Study, Suite, in_order

# In place of a folder. One of this name is ./phantom.
_PHANTOM = "phantom"


def parse_study(argv: Sequence[str] | None = None) -> tuple[Study, int, bool]:
    """Return the study that is asked for, how many runs at a time, and whether only to list them.

    Raises:
        UsageError: a value is not acceptable.
    """
    parser = Parser(prog="medfast.study", description=COMMANDS["study"], allow_abbrev=False)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["all"],
        metavar="METHOD",
        help=f"all, or some of: {', '.join(METHODS)}. (default: all)",
    )
    parser.add_argument(
        "--budget",
        default="quick",
        metavar="NAME",
        help=f"Settings of every run: {', '.join(BUDGETS)}, or a YAML file as for medfast train "
        "--config. (default: quick)",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="The study's folder (default: studies/ and the budget's name)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="Runs at a time (default: 1)"
    )
    parser.add_argument(
        "--list", action="store_true", help="Print the commands of the runs, and run nothing."
    )
    parser.add_argument(
        "--pretrained",
        metavar="SOURCE",
        help="General-domain weights, as for medfast train; without it the study trains some.",
    )
    parser.add_argument(
        "--data-root",
        metavar="DIR",
        help="Evaluate the runs on what is there of 25 data sets, as medfast evaluate does; "
        f"'{_PHANTOM}': on phantoms of all of them, which the study writes.",
    )
    add_places(parser)
    parser.add_argument(
        "--datasets", nargs="+", default=[], metavar="KEY", help="Evaluate on these alone."
    )
    given = parser.parse_args(argv)
    for name in given.methods:
        if name not in ("all", *METHODS):
            raise UsageError(unknown_name("--methods", name, ("all", *METHODS)))
    if given.jobs < 1:
        raise UsageError(f"--jobs must be at least 1; got {given.jobs}.")
    methods = in_order(list(METHODS) if "all" in given.methods else given.methods)
    out = Path(given.out or Path("studies") / Path(given.budget).stem).expanduser()
    settings = _read_budget(given.budget)
    suite = _suite(given.data_root, given.data, given.datasets, out)
    study = Study(methods, given.budget, settings, out, given.pretrained, suite)
    return study, given.jobs, given.list


def _suite(
    root: str | None, places: Sequence[str], chosen: Sequence[str], out: Path
) -> Suite | None:
    """Return what the runs are evaluated on, if anything is asked for."""
    for key in chosen:
        if key not in EVALUATIONS:
            raise UsageError(unknown_name("--datasets", key, EVALUATIONS))
    if root is None and not places:
        if chosen:
            raise UsageError("--datasets: say where they are, with --data-root or --data.")
        return None
    data = ["--data", *places] if places else []
    keys = ["--datasets", *chosen] if chosen else []
    if root == _PHANTOM:
        if places:
            raise UsageError(f"--data-root {_PHANTOM} has all data sets; leave out --data.")
        base = out / SUITE_DATA
        roots = {key: base / folder(key) for key in chosen or EVALUATIONS}
        words = ("--data-root", str(base), *keys)
        return Suite(("--data-root", root, *keys), words, roots, is_phantom=True)
    words = (*([] if root is None else ["--data-root", root]), *data, *keys)
    # The model does not matter here.
    return Suite(words, words, parse_evaluate(["--model", "any", *words]).roots)


def _read_budget(name: str) -> dict[str, Any]:
    """Return the settings of --budget, a name or a file."""
    if name in BUDGETS:
        return BUDGETS[name]
    path = Path(name)
    if not path.exists() and path.suffix not in (".yaml", ".yml"):
        raise UsageError(
            unknown_name("--budget", name, BUDGETS) + " Or name a YAML file of settings."
        )
    try:
        settings = read_config(path)
    except UsageError as error:
        raise UsageError("--budget" + str(error).removeprefix("--config")) from None
    for key in OWN_SETTINGS:
        if key in settings:
            raise UsageError(f"--budget {name} sets {key}, which is the study's; leave it out.")
    try:
        TrainConfig(**settings)
    except UsageError as error:
        raise UsageError(f"--budget {name}: {error}") from None
    return settings
