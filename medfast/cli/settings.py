"""Flags from the settings of a run, and the files that hold some."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from medfast.cli.commands import COMMANDS
from medfast.cli.parser import Parser
from medfast.config import RECIPES, TrainConfig, flag
from medfast.errors import UsageError, unknown_name


def settings_parser(command: str, epilog: str) -> Parser:
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


def merged_settings(given: dict[str, Any]) -> dict[str, Any]:
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
