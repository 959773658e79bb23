"""`python -m medfast.study`: list the runs, or run what is left of them and compare."""

from __future__ import annotations

import logging
import sys
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
        text, failed = run(study, jobs)
        print(text)
        if failed:
            # As a text it goes to stderr, and the exit code is 1.
            sys.exit(
                "\n".join(
                    [
                        *(f"{name}: {reason}" for name, reason in failed.items()),
                        f"medfast.study: error: {len(failed)} of the runs could not be evaluated "
                        "on all data sets; the same command tries what is left again.",
                    ]
                )
            )

    cli.run(command, "medfast.study")


def run(study: Study, jobs: int) -> tuple[str, dict[str, str]]:
    """Run what is left of a study, and write its tables and its page.

    Returns:
        The tables; and the runs whose evaluation failed, and why.

    Raises:
        UsageError: something that the user can mend.
    """
    from medfast.study.execute import check_runnable, execute
    from medfast.study.page import write_study_page
    from medfast.study.report import document, tables
    from medfast.study.results import read_outcome, with_suite, write_csv

    check(study)
    check_runnable(study)
    with locked(study) as lock:
        record = check(study)  # again: another study may have been at work until now
        if study.suite is not None:
            record.content["phantom_suite"] = study.suite.is_phantom
        record.save()
        failed = execute(study, record, jobs, lock)
        runs = study.plan(best(study))
        done = [read_outcome(study, run) for run in runs if is_done(study, run)]
        outcomes = with_suite(study, done)
        write_csv(study.out / "results.csv", outcomes)
        (study.out / "study.md").write_text(document(study, record, outcomes), encoding="utf-8")
        page = write_study_page(study.out / "study.html", study, record, outcomes)
    log.info("wrote %s, with study.md and results.csv beside it", page)
    return tables(study, record, outcomes), failed


if __name__ == "__main__":
    main()
