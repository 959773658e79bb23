"""The command line: flags from dataclasses, one-sentence errors, and what is printed."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from medfast.config import RECIPES, Device, Precision, TrainConfig, flag
from medfast.errors import SharedError, StoppedError, UsageError, unknown_name
from medfast.evals.compare import Request
from medfast.evals.prompts import CHOICES
from medfast.evals.suite import EVALUATIONS, SUITES, folder
from medfast.evals.suite.plan import Plan
from medfast.methods import METHODS
from medfast.study.plan import BUDGETS, OWN_SETTINGS, Study, in_order

COMMANDS = {
    "train": "Train one model, evaluate it and write its report.",
    "data": "Check and pack image-caption data, or write the phantom.",
    "env": "Print versions, devices and which implementations can run here.",
    "profile": "Time training steps with a fused loss beside those with the reference.",
    "study": "Train methods, seeds and initialisations under one budget, and compare them.",
    "evaluate": "Evaluate a model on what is there of 25 data sets.",
    "results": "Compare evaluations of several runs in one table.",
}
TRAIN_EPILOG = """\
Settings come from the defaults, then from --recipe, from --config and from the flags. The merged
result is saved with the run as params.yaml, which --config takes back."""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one sentence."""

    def error(self, message: str) -> NoReturn:
        # Every process has the same command line.
        self.exit(2, f"{self.prog}: error: {message}\n" if rank() == 0 else None)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, naming the closest flag for one that does not exist."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            close = difflib.get_close_matches(name, self._option_string_actions, n=1)
            hint = f"Did you mean {close[0]}? " if close else ""
            self.error(f"unknown argument {unknown[0]!r}. {hint}See {self.prog} --help.")
        return parsed


def run(command: Callable[[], None], prog: str) -> None:
    """Run a command; end with exit code 2 and one sentence on a mistake of the user's."""
    code = _run(command, prog)
    joined = sys.modules.get("medfast.distributed.processes")
    if joined is not None and joined.has_joined:
        # Threads of torch.distributed may still be about to ask for the interpreter, and a process
        # whose interpreter ends meanwhile is aborted by them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def _run(command: Callable[[], None], prog: str) -> int:
    """Return the exit code of a command, having told what was wrong."""
    try:
        command()
    except (SharedError, StoppedError) as error:
        code = 2 if isinstance(error, SharedError) else 128 + signal.SIGTERM
        return _fail(prog, str(error), code) if rank() == 0 else code
    except UsageError as error:
        return _fail(prog, str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "medfast":
            raise
        return _fail(
            prog,
            f"the package {error.name!r} is missing: install what the commands need with "
            "pip install '.[train]' in medfast's checkout.",
        )
    except KeyboardInterrupt:
        return _fail(prog, "stopped by the keyboard.", code=130)
    return 0


def rank() -> int:
    """Return the number of this process among those that torchrun started."""
    return int(os.environ.get("RANK", "0"))


def _fail(prog: str, message: str, code: int = 2) -> int:
    where = f"rank {rank()}: " if rank() else ""
    print(f"{prog}: error: {where}{message}", file=sys.stderr)
    return code


def parse_train(argv: Sequence[str] | None = None) -> tuple[TrainConfig, set[str]]:
    """Return the settings that `argv` (default: the command line) and its --config ask for.

    Returns:
        The settings, and the names of those that were given rather than left at their defaults.

    Raises:
        UsageError: a value is not acceptable.
    """
    parser = _settings_parser("train", TRAIN_EPILOG)
    given = vars(parser.parse_args(argv))
    try:
        settings = _settings(given)
        return TrainConfig(**settings), set(settings)
    except UsageError as error:
        # Every process has the same command line.
        raise SharedError(str(error)) from None


def parse_profile(argv: Sequence[str] | None = None) -> tuple[TrainConfig, int]:
    """Return the settings of the run to profile, and how many steps to time.

    Raises:
        UsageError: a value is not acceptable.
    """
    parser = _settings_parser("profile", "It takes the flags of medfast train and leaves no run.")
    parser.add_argument(
        "--steps", type=int, default=20, metavar="N", help="Steps to time (default: 20)"
    )
    given = vars(parser.parse_args(argv))
    steps = given.pop("steps")
    if steps < 1:
        raise UsageError(f"--steps must be at least 1; got {steps}.")
    config = TrainConfig(**_settings(given))
    if config.fused_loss == "reference":
        raise UsageError(
            "--no-fused-loss: the reference is what the profile compares with; name another "
            "implementation with --fused-loss."
        )
    for name in ("resume", "dry_run"):
        if getattr(config, name):
            raise UsageError(f"{flag(name)} is for medfast train; leave it out.")
    return config, steps


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
    given = parser.parse_args(argv)
    for name in given.methods:
        if name not in ("all", *METHODS):
            raise UsageError(unknown_name("--methods", name, ("all", *METHODS)))
    if given.jobs < 1:
        raise UsageError(f"--jobs must be at least 1; got {given.jobs}.")
    methods = in_order(list(METHODS) if "all" in given.methods else given.methods)
    out = Path(given.out or Path("studies") / Path(given.budget).stem).expanduser()
    settings = _read_budget(given.budget)
    return Study(methods, given.budget, settings, out, given.pretrained), given.jobs, given.list


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


def parse_evaluate(argv: Sequence[str] | None = None) -> Plan:
    """Return what to evaluate on which data sets.

    Raises:
        UsageError: a value is not acceptable, or no data set is there.
    """
    parser = Parser(prog="medfast.evaluate", description=COMMANDS["evaluate"], allow_abbrev=False)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--checkpoint", metavar="RUN", help="A run folder, or one of its checkpoints."
    )
    model.add_argument(
        "--model",
        metavar="SOURCE",
        help="A CLIP of open_clip or transformers: a local folder, or a name on the hub.",
    )
    for name, metavar, default, text in (
        ("--suite", "NAME", SUITES[0], f"One of: {', '.join(SUITES)}."),
        ("--data-root", "DIR", None, "Folder with a folder for each data set."),
        (
            "--out",
            "DIR",
            None,
            "Folder of the results; without it RUN/evaluations, or for --model "
            "evaluations/ and its name.",
        ),
        ("--prompts", "NAME", CHOICES[0], f"Of zero-shot. One of: {', '.join(CHOICES)}."),
        ("--device", "NAME", "auto", f"One of: {', '.join(get_args(Device))}."),
        ("--precision", "NAME", "auto", f"One of: {', '.join(get_args(Precision))}."),
        ("--cache-dir", "DIR", TrainConfig.cache_dir, "Folder that keeps the images' features."),
    ):
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(name, metavar=metavar, default=default, help=text + shown)
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="KEY:FOLDER",
        help="Where single data sets are, in place of their folders in --data-root.",
    )
    parser.add_argument(
        "--datasets", nargs="+", metavar="KEY", help=f"Some of: {', '.join(EVALUATIONS)}."
    )
    for name, count, text in (
        ("--batch-size", 128, "Images that pass through the towers at a time"),
        ("--workers", TrainConfig.workers, "Processes that decode images"),
        ("--seed", 0, "Of the intervals, of the draws of labels and of the VQA head"),
    ):
        parser.add_argument(
            name, type=int, default=count, metavar="N", help=f"{text} (default: {count})"
        )
    parser.add_argument(
        "--skip-existing", action="store_true", help="Keep the results that are there."
    )
    parser.add_argument(
        "--vqa-finetune", action="store_true", help="Train the towers too, for questions."
    )
    given = parser.parse_args(argv)
    for name, value, known in (
        ("--suite", given.suite, SUITES),
        ("--prompts", given.prompts, CHOICES),
        ("--device", given.device, get_args(Device)),
        ("--precision", given.precision, get_args(Precision)),
        *(("--datasets", key, EVALUATIONS) for key in given.datasets or ()),
    ):
        if value not in known:
            raise UsageError(unknown_name(name, value, known))
    for name, number, least in (
        ("--batch-size", given.batch_size, 1),
        ("--workers", given.workers, 0),
        ("--seed", given.seed, 0),
    ):
        if number < least:
            raise UsageError(f"{name} must be at least {least}; got {number}.")
    source = given.checkpoint or given.model
    if given.checkpoint and not Path(source).expanduser().exists():
        raise UsageError(f"--checkpoint {source}: there is no such run folder or checkpoint.")
    if given.out is not None:
        out = Path(given.out).expanduser()
    elif given.checkpoint:
        run = Path(source).expanduser()
        out = (run if run.is_dir() else run.absolute().parent.parent) / "evaluations"
    else:
        out = Path("evaluations") / Path(source).name.replace(":", "-")
    return Plan(
        suite=given.suite,
        flag="--checkpoint" if given.checkpoint else "--model",
        source=source,
        roots=_evaluated(given.data_root, given.data, given.datasets),
        out=out,
        cache=Path(given.cache_dir).expanduser(),
        skip_existing=given.skip_existing,
        prompts=given.prompts,
        vqa_finetune=given.vqa_finetune,
        batch_size=given.batch_size,
        workers=given.workers,
        device=given.device,
        precision=given.precision,
        seed=given.seed,
    )


def _evaluated(
    root: str | None, places: Sequence[str], chosen: Sequence[str] | None
) -> dict[str, Path]:
    """Return the folder of each data set to evaluate, of which at least one is there."""
    if root is None and not places:
        raise UsageError("--data-root is missing: name the folder that holds the data sets.")
    found: dict[str, Path] = {}
    if root is not None:
        base = Path(root).expanduser()
        if not base.is_dir():
            raise UsageError(f"--data-root {root}: there is no such folder.")
        found = {key: base / folder(key) for key in EVALUATIONS}
    for place in places:
        key, _, own = place.partition(":")
        if key not in EVALUATIONS:
            raise UsageError(unknown_name("--data", key, EVALUATIONS))
        if not own or not Path(own).expanduser().exists():
            raise UsageError(
                f"--data {place}: it must be {key}:FOLDER with a folder that exists; "
                f"{own or 'nothing'} does not."
            )
        found[key] = Path(own).expanduser()
    for key in chosen or ():
        if key not in found:
            raise UsageError(f"--datasets {key}: give --data-root, or --data {key}:FOLDER.")
    asked = {key: found[key] for key in EVALUATIONS if key in (chosen or found) and key in found}
    if not any(path.exists() for path in asked.values()):
        names = ", ".join(dict.fromkeys(str(path) for path in asked.values()))
        raise UsageError(
            f"none of the data sets is there; looked for {names}. The README says how to get them."
        )
    return asked


def parse_results(argv: Sequence[str] | None = None) -> Request:
    """Return which runs to compare, and what to write."""
    parser = Parser(prog="medfast results", description=COMMANDS["results"], allow_abbrev=False)
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="RUN",
        help="A run folder, a folder that medfast evaluate wrote, or a .json or .jsonl of results.",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=["main"],
        metavar="NAME",
        help="Metrics of the table, or main, or all. (default: main)",
    )
    for name, text in (
        ("--csv", "Write one line per run and metric, of all metrics."),
        ("--markdown", "Write the table that is printed."),
        ("--png", "Draw the table as a heat map."),
    ):
        parser.add_argument(name, metavar="FILE", help=text)
    given = parser.parse_args(argv)
    files = {
        name: None if value is None else Path(value).expanduser()
        for name, value in (("csv", given.csv), ("markdown", given.markdown), ("png", given.png))
    }
    sources = tuple(Path(source).expanduser() for source in given.sources)
    return Request(sources, tuple(given.metrics), **files)


def _settings_parser(command: str, epilog: str) -> Parser:
    """Return the parser of a command that takes the settings of a run."""
    parser = Parser(
        prog=f"medfast.{command}",
        description=COMMANDS[command],
        epilog=epilog,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings.")
    recipes = "; ".join(
        f"{name}: " + ", ".join(f"{flag(key)} {value}" for key, value in settings.items())
        for name, settings in RECIPES.items()
    )
    parser.add_argument("--recipe", metavar="NAME", help=f"Published settings. {recipes}.")
    add_settings(parser, TrainConfig)
    return parser


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the flags `given`, over those of their --config and --recipe."""
    file, recipe = given.pop("config", None), given.pop("recipe", None)
    if recipe is not None and recipe not in RECIPES:
        raise UsageError(unknown_name("--recipe", recipe, RECIPES))
    below = {} if recipe is None else RECIPES[recipe]
    return {**below, **(read_config(Path(file)) if file is not None else {}), **given}


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file such as a run's params.yaml.

    Raises:
        UsageError: the file is missing, is no YAML mapping or names an unknown setting.
    """
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--config {path} is not YAML: {reason}.") from None
    if not isinstance(settings, dict):
        raise UsageError(f"--config {path} must hold 'setting: value' lines.")
    known = [item.name for item in dataclasses.fields(TrainConfig)]
    for name in settings:
        if name not in known:
            raise UsageError(f"--config {path}: " + unknown_name("setting", str(name), known))
    return settings


def add_settings(parser: argparse.ArgumentParser, config: type) -> None:
    """Give `parser` one flag per field of the dataclass `config`, under its group's heading."""
    types = get_type_hints(config)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for item in dataclasses.fields(config):
        title = item.metadata["group"]
        group = groups.setdefault(title, parser.add_argument_group(title))
        default = _default(item.default)
        known = item.metadata.get("known") or get_args(types[item.name])
        names = f" One of: {', '.join(known)}." if _is_choice(item, types[item.name]) else ""
        text = f"{item.metadata['help']}{names} (default: {default})".replace("%", "%%")
        if item.name == "fused_loss":
            group.add_argument("--fused-loss", nargs="?", const="auto", metavar="IMPL", help=text)
            group.add_argument(
                "--no-fused-loss",
                dest="fused_loss",
                action="store_const",
                const="reference",
                help="The reference implementation, which keeps all pairs' logits.",
            )
        elif types[item.name] is bool:
            group.add_argument(flag(item.name), action=argparse.BooleanOptionalAction, help=text)
        else:
            group.add_argument(flag(item.name), help=text, **_value(types[item.name]))


def _default(value: Any) -> str:
    """Return a default as the help shows it."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value).lower()


def _is_choice(item: dataclasses.Field, annotation: Any) -> bool:
    return "known" in item.metadata or get_origin(annotation) is Literal


def _value(annotation: Any) -> dict[str, Any]:
    several = {"nargs": "+"} if get_origin(annotation) is tuple else {}
    kind = next((t for t in (get_args(annotation) or (annotation,)) if t in (int, float)), str)
    # The sets of allowed words are checked by the dataclass, which also names the closest one.
    return {"type": kind, "metavar": {int: "N", float: "X", str: "VALUE"}[kind], **several}


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return result rows as a text table, one line per metric."""
    lines = [f"{'task':<32} {'n':>6} {'value':>8}   {'95 % interval':<17} {'chance':>7}"]
    for row in rows:
        for name, value in row["metrics"].items():
            low, high = row["ci95"][name]
            title = " ".join(part for part in (row["task"], row["name"], name) if part)
            lines.append(
                f"{title:<32} {row['n']:>6} {value:>8.1%}   {low:>6.1%} to {high:<7.1%} "
                f"{row['chance'][name]:>7.1%}"
            )
    return "\n".join(lines)


class ConsoleHandler(logging.Handler):
    """Prints log lines to stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        if getattr(record, "progress", False) and sys.stderr.isatty():
            return  # the bar says it
        tqdm.write(self.format(record), file=sys.stderr)


def log_to_console() -> None:
    """Let medfast's log lines appear on stderr, of several processes those of the first."""
    logger = logging.getLogger("medfast")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    kind = logging.NullHandler if rank() else ConsoleHandler
    if not any(isinstance(handler, kind) for handler in logger.handlers):
        logger.addHandler(kind())


def main(argv: Sequence[str] | None = None) -> None:
    """Run `medfast COMMAND ...`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(
        prog="medfast",
        description="Fused contrastive losses and fast training for medical vision-language "
        "models.",
        epilog="commands:\n" + "".join(f"  {n:8} {text}\n" for n, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", nargs="?", help="one of those below")
    name = parser.parse_args(arguments[:1]).command
    if name is None:
        parser.error(f"COMMAND is missing; it is one of: {', '.join(COMMANDS)}.")
    if name not in COMMANDS:
        parser.error(unknown_name("command", name, COMMANDS))
    if name == "env":
        from medfast import env

        Parser(prog="medfast env", description=COMMANDS["env"]).parse_args(arguments[1:])
        print(env.describe())
    elif name == "train":
        from medfast import train

        train.main(arguments[1:])
    elif name == "profile":
        from medfast import profile

        profile.main(arguments[1:])
    elif name == "study":
        from medfast.study import __main__ as study

        study.main(arguments[1:])
    elif name == "evaluate":
        from medfast import evaluate

        evaluate.main(arguments[1:])
    elif name == "results":
        from medfast import results

        results.main(arguments[1:])
    else:
        from medfast.data import __main__ as data

        data.main(arguments[1:])
