"""Argument parsers that say in one sentence what is wrong."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn

from medfast.cli.process import rank


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
