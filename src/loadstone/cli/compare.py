"""``loadstone compare``: is the second run worse than the first?"""

from pathlib import Path

from loadstone.core.errors import EXIT_FAILED, EXIT_OK


def compare(run_a: Path, run_b: Path, *, tolerance: float = 0.05) -> int:
    """Print two run folders side by side; exit status 1 where the second is worse.

    Parameters
    ----------
    run_a
        The run to compare with.
    run_b
        The run in question.
    tolerance
        Share by which the line, and the throughput at levels in common, may fall.
    """
    from rich.console import Console

    from loadstone.report.compare import compare as hold_against
    from loadstone.report.compare import print_comparison
    from loadstone.report.folder import read_run

    comparison = hold_against(read_run(run_a), read_run(run_b), tolerance=tolerance)
    print_comparison(comparison, Console())
    return EXIT_FAILED if comparison.worse else EXIT_OK
