"""``loadstone report``: the page and the picture of a run that has been measured."""

from pathlib import Path

from loadstone.core.errors import EXIT_OK


def report(run_dir: Path, *, text: bool = False) -> int:
    """Write report.html and concurrency_analysis.png into a run folder and print their paths.

    A run of rate has neither: its levels and its answer are printed again.

    Parameters
    ----------
    run_dir
        The run folder.
    text
        Print the table of levels and the answer as well.
    """
    from rich.console import Console

    from loadstone.cli.rate_view import print_rate, read_rate
    from loadstone.measure.rate_run import RATE_FILE
    from loadstone.report.folder import read_run
    from loadstone.report.page import write_report
    from loadstone.report.tables import print_answer

    if (run_dir / RATE_FILE).is_file():
        print_rate(read_rate(run_dir / RATE_FILE), Console())
        return EXIT_OK
    if text:
        print_answer(read_run(run_dir).verdict, Console())
    for path in write_report(run_dir):
        print(path)
    return EXIT_OK
