"""The command line of `medfast evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from medfast.cli.commands import COMMANDS
from medfast.cli.parser import Parser
from medfast.config import Device, Precision, TrainConfig
from medfast.errors import UsageError, unknown_name
from medfast.evals.prompts import CHOICES
from medfast.evals.suite import EVALUATIONS, SUITES, folder
from medfast.evals.suite.plan import Plan

# Not "pure_bf16": the weights that are evaluated are fp32.
_PRECISIONS = tuple(name for name in get_args(Precision) if name != "pure_bf16")


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
        ("--precision", "NAME", "auto", f"One of: {', '.join(_PRECISIONS)}."),
        ("--cache-dir", "DIR", TrainConfig.cache_dir, "Folder that keeps the images' features."),
    ):
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(name, metavar=metavar, default=default, help=text + shown)
    add_places(parser)
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
        ("--precision", given.precision, _PRECISIONS),
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


def add_places(parser: Parser) -> None:
    """Give a parser the flag that says where single data sets are."""
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="KEY:FOLDER",
        help="Where single data sets are, in place of their folders in --data-root.",
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
                f"--data {place}: it must be {key}:FOLDER with a folder that exists"
                f"{f'; {own} does not' if own else ''}."
            )
        found[key] = Path(own).expanduser()
    for key in chosen or ():
        if key not in found:
            raise UsageError(f"--datasets {key}: give --data-root, or --data {key}:FOLDER.")
    asked = {key: found[key] for key in EVALUATIONS if key in (chosen or found) and key in found}
    if not any(path.exists() for path in asked.values()):
        names = ", ".join(dict.fromkeys(str(path) for path in asked.values()))
        raise UsageError(
            f"none of the data sets is there; looked for {names}. docs/evaluation.md says how to "
            "get them."
        )
    return asked
