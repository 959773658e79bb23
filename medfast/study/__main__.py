"""`python -m medfast.study`: list the runs, or run what is left of them and compare."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from medfast import cli
from medfast.study.folder import best, check, is_done, listing, locked
from medfast.study.plan import Study

# By name: run as a command, this module is called __main__.
log = logging.getLogger("medfast.study")


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m medfast.study ...`."""

    def command() -> None:
        study, jobs, only_list = cli.parse_study(argv)
        if only_list:
            check(study)
            print(listing(study))
            return
        cli.log_to_console()
        print(run(study, jobs))

    cli.run(command, "medfast.study")


def versions() -> dict[str, str | None]:
    """Return the versions of what runs now."""
    from medfast.evals.provenance import provenance

    return {name: value for name, value in provenance().items() if name != "command"}


def run(study: Study, jobs: int) -> str:
    """Run what is left of a study, write its tables and return them.

    Raises:
        UsageError: something that the user can mend.
    """
    from medfast.study.execute import check_runnable, execute
    from medfast.study.report import document, tables
    from medfast.study.results import read_outcome, write_csv

    check(study)
    check_runnable(study)
    with locked(study) as lock:
        record = check(study)  # again: another study may have been at work until now
        record.content["versions"] = versions()
        record.save()
        execute(study, record, jobs, lock)
        runs = study.plan(best(study))
        outcomes = [read_outcome(study, run) for run in runs if is_done(study, run)]
        write_csv(study.out / "results.csv", outcomes)
        (study.out / "study.md").write_text(document(study, record, outcomes), encoding="utf-8")
    log.info("wrote %s and results.csv beside it", study.out / "study.md")
    return tables(study, record, outcomes)


if __name__ == "__main__":
    main()
