"""The command line: one function for each verb, imported when it is called."""

import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from cyclopts import App, CycloptsError
from cyclopts.config import Env, Toml

from loadstone import __version__
from loadstone.cli.command import shown_command
from loadstone.cli.presets import HELP as PRESET_HELP
from loadstone.cli.presets import MeasuredRun, expand
from loadstone.core.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, LoadstoneError, UsageError

_CONFIG_FILE = "loadstone.toml"
_HELP = "How many concurrent requests can my model server take? Measure it, and hold the server to it."
_VERBS = {
    "demo": "Embedded engine, search, report: nothing to configure, about a minute.",
    "find": "Find how many concurrent requests the server takes.",
    "bench": "Measure one level: flags, output and JSON of `vllm bench serve`.",
    "rate": "Find the smallest concurrency that sustains a request rate.",
    "judge": "Judge a run again from its records, or a folder of benchmark results.",
    "report": "Write the page and the picture of a run again.",
    "compare": "Hold two runs against each other.",
    "sim": "Run a simulated model server on a real port.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Foreseeable errors are one line on standard error."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    try:
        config_file = _config_file(tokens)
        expansion = expand(tokens, _measured_run)
        if expansion.show:
            named = [] if config_file in (None, Path(_CONFIG_FILE)) else ["--config", str(config_file)]
            print(shown_command(["loadstone", *expansion.tokens, *named]))
            return EXIT_OK
        app = build_app(config_file)
        result = app(expansion.tokens, exit_on_error=False, print_error=False, result_action="return_value")
        return result if isinstance(result, int) else 0
    except CycloptsError as error:
        return _complain(str(error), EXIT_USAGE)
    except LoadstoneError as error:
        return _complain(str(error), error.exit_status)
    except KeyboardInterrupt:
        return _complain("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has gone; Python must not complain about it again at exit.
        sys.stdout = None
        return EXIT_INTERRUPTED


def build_app(config_file: Path | None) -> App:
    """All verbs. A flag beats ``LOADSTONE_<FLAG>``, which beats the configuration file."""
    config: list[Env | Toml] = [Env("LOADSTONE_", command=False)]
    if config_file is not None:
        config.append(Toml(config_file, use_commands_as_keys=False, allow_unknown=True, must_exist=True))
    app = App(name="loadstone", help=_HELP, version=__version__, config=config, suppress_keyboard_interrupt=False)
    for verb, summary in _VERBS.items():
        epilogue = PRESET_HELP if verb in ("find", "bench") else None
        app.command(f"loadstone.cli.{verb}:{verb}", name=verb, help=summary, help_epilogue=epilogue)
    return app


def _measured_run(folder: str) -> MeasuredRun:
    # Imported where it is called, so that --help stays quick.
    from loadstone.cli.measured import measured_run

    return measured_run(folder)


def _config_file(tokens: list[str]) -> Path | None:
    """``--config FILE``, taken out of ``tokens``, else the one in the current folder. Raises UsageError."""
    for position, token in enumerate(tokens):
        if token == "--config" and position + 1 < len(tokens):
            return _readable(Path(_take(tokens, position, 2)[1]))
        if token.startswith("--config="):
            return _readable(Path(_take(tokens, position, 1)[0].removeprefix("--config=")))
    return _readable(Path(_CONFIG_FILE)) if Path(_CONFIG_FILE).is_file() else None


def _readable(path: Path) -> Path:
    """``path``, where it holds TOML: what reads it later does not name the file."""
    try:
        tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"configuration file {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"configuration file {path} cannot be read: {error}") from None
    return path


def _take(tokens: list[str], position: int, count: int) -> list[str]:
    taken = tokens[position : position + count]
    del tokens[position : position + count]
    return taken


def _complain(message: str, status: int) -> int:
    print(f"loadstone: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
