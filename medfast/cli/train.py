"""The command line of `medfast train`."""

from __future__ import annotations

from collections.abc import Sequence

from medfast.cli.settings import merged_settings, settings_parser
from medfast.config import TrainConfig
from medfast.errors import SharedError, UsageError

EPILOG = """\
Settings come from the defaults, then from --recipe, from --config and from the flags. The merged
result is saved with the run as params.yaml, which --config takes back."""


def parse_train(argv: Sequence[str] | None = None) -> tuple[TrainConfig, set[str]]:
    """Return the settings that `argv` (default: the command line) and its --config ask for.

    Returns:
        The settings, and the names of those that were given rather than left at their defaults.

    Raises:
        UsageError: a value is not acceptable.
    """
    parser = settings_parser("train", EPILOG)
    given = vars(parser.parse_args(argv))
    try:
        settings = merged_settings(given)
        return TrainConfig(**settings), set(settings)
    except UsageError as error:
        # Every process has the same command line.
        raise SharedError(str(error)) from None
