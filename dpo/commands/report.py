"""`dpo report` and `dpo watch`: a run as a page, several compared, and a run as it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpo.commands.checks import load_run
from dpo.config import ReportConfig, WatchConfig
from dpo.terminal import print_plain


def report_runs(given: ReportConfig, directories: Sequence[str]) -> None:
    """Write the report of one run, or the comparison of several, and say where it is."""
    runs = [(run, load_run(run)) for run in dict.fromkeys(directories)]
    if len(runs) == 1:
        from dpo.pages.report import write_report

        path = write_report(*runs[0], output=given.output)
    else:
        from dpo.pages.comparison import write_comparison

        path = write_comparison(runs, output=given.output)
    print_plain(f"report: {path}")


def watch_run(given: WatchConfig) -> bool:
    """Draw a run's curves until it ends, or once; whether it is finished."""
    config = load_run(given.run)
    from dpo.pages.watch import watch

    return watch(Path(given.run), config, interval=given.interval, once=given.once)
