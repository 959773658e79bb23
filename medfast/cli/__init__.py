"""The command line: flags from dataclasses, one-sentence errors, and what is printed."""

from medfast.cli.commands import COMMANDS, main
from medfast.cli.data import parse_data
from medfast.cli.evaluate import parse_evaluate
from medfast.cli.export import parse_export
from medfast.cli.output import log_to_console, results_table
from medfast.cli.parser import Parser
from medfast.cli.process import rank, run
from medfast.cli.profile import parse_profile
from medfast.cli.results import parse_results
from medfast.cli.settings import read_config
from medfast.cli.study import parse_study
from medfast.cli.train import parse_train

__all__ = [
    "COMMANDS",
    "Parser",
    "log_to_console",
    "main",
    "parse_data",
    "parse_evaluate",
    "parse_export",
    "parse_profile",
    "parse_results",
    "parse_study",
    "parse_train",
    "rank",
    "read_config",
    "results_table",
    "run",
]
