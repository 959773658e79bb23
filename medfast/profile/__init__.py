"""`python -m medfast.profile`: where the time and the memory of training steps go."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m medfast.profile ...`."""
    from medfast import cli

    def command() -> None:
        plan = cli.parse_profile(argv)
        cli.log_to_console()
        from medfast.profile.run import run

        table = run(plan)
        if cli.rank() == 0:
            print(table)

    cli.run(command, "medfast.profile")
