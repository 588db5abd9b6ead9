"""The command line: one function for each verb, imported when it is called."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Dict, Env

from loadstone import __version__
from loadstone.cli.command import shown_command
from loadstone.cli.config import CONFIG_FILE, ENV_PREFIX, Flags, from_environment, from_short_names, take_config
from loadstone.cli.presets import HELP as PRESET_HELP
from loadstone.cli.presets import MeasuredRun, expand
from loadstone.core.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, LoadstoneError

_HELP = "How many concurrent requests can my model server take? Measure it, and hold the server to it."
_SETTINGS_HELP = (
    "Every flag is equally an environment variable (--base-url: LOADSTONE_BASE_URL) and a key of loadstone.toml or "
    "--config FILE. A flag beats the environment, which beats the file."
)
_GROUPS = {"serve": "Serve a chat model, a reranker or embeddings behind a gate of their own."}
"""Verbs that only stand before others."""
_VERBS = {
    "demo": "Embedded engine, search, report: nothing to configure, about a minute.",
    "find": "Find how many concurrent requests the server takes.",
    "bench": "Measure one level: flags, output and JSON of `vllm bench serve`.",
    "rate": "Find the smallest concurrency that sustains a request rate.",
    "judge": "Judge a run again from its records, or a folder of benchmark results.",
    "report": "Write the page and the picture of a run again.",
    "compare": "Hold two runs against each other.",
    "gate": "Hold model servers to their limits: admit, queue a little, refuse the rest at once.",
    "serve chat": "Serve a chat model behind its own gate.",
    "serve rerank": "Serve a reranker behind its own gate.",
    "serve embed": "Serve embeddings of text and images behind their own gate.",
    "watch": "Watch a gate live in the terminal.",
    "sim": "Run a simulated model server on a real port.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Foreseeable errors are one line on standard error."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(tokens, shown_command(tokens))
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


def _run(tokens: list[str], typed: str) -> int:
    """``typed``: the command line, to be kept in the run folder."""
    config = take_config(tokens)

    def settings_of(verb: str) -> dict[str, Any]:
        return config.settings_of(verb, known_flags()) if config.document and verb in _VERBS else {}

    expansion = expand(tokens, _measured_run, lambda verb: settings_of(verb) | from_environment())
    for note in expansion.notes:
        print(f"loadstone: {note}", file=sys.stderr)
    if expansion.show:
        named = [] if config.path == Path(CONFIG_FILE) else ["--config", str(config.path)]
        print(shown_command([*expansion.tokens, *named]))
        return EXIT_OK
    verb = _verb(expansion.tokens)
    app = build_app(verb, settings_of(verb), str(config.path))
    command, bound, unparsed = app.parse_args(expansion.tokens, exit_on_error=False, print_error=False)
    status = command(*bound.args, **bound.kwargs, **dict.fromkeys(unparsed, typed))
    return status if isinstance(status, int) else EXIT_OK


def _verb(tokens: Sequence[str]) -> str:
    """The verb that is called, of one word or two."""
    words = 2 if tokens and tokens[0] in _GROUPS else 1
    return " ".join(tokens[:words])


def build_app(called: str = "", settings: Mapping[str, Any] | None = None, source: str = "") -> App:
    """All verbs. A flag beats ``LOADSTONE_<FLAG>``, which beats ``settings``, those of the file ``source``.

    The verb that is ``called`` shows its whole docstring as help; the others have a line in the list of verbs.
    """
    given = Dict(dict(settings or {}), use_commands_as_keys=False, allow_unknown=True, source=source)
    short = Dict(from_short_names(called), use_commands_as_keys=False, allow_unknown=True, source="the environment")
    app = App(
        name="loadstone",
        help=_HELP,
        version=__version__,
        config=(Env(ENV_PREFIX, command=False, show=False), short, given),
        default_parameter=Parameter(show_default=_shown),
        suppress_keyboard_interrupt=False,
    )
    groups = {group: App(name=group, help=summary) for group, summary in _GROUPS.items()}
    for verb, summary in _VERBS.items():
        epilogue = f"{PRESET_HELP}\n{_SETTINGS_HELP}" if verb in ("find", "bench") else _SETTINGS_HELP
        group, _, name = verb.rpartition(" ")
        (groups[group] if group else app).command(
            f"loadstone.cli.{group or name}:{name}",
            name=name,
            help=None if verb == called else summary,
            help_epilogue=epilogue,
        )
    for inner in groups.values():
        app.command(inner)
    return app


def command_of(app: App, verb: str) -> App:
    """The command of a verb of one word or two."""
    for word in verb.split():
        app = app[word]
    return app


def _shown(default: object) -> str | None:
    """A default as --help shows it: what stands for "nothing" is not worth a word."""
    if default is None or default is False or default in ("", ()):
        return None
    return f"{default:g}" if isinstance(default, float) else str(default)


def known_flags() -> dict[str, Flags]:
    """The flags of every verb, for a configuration file to be held against."""
    app = build_app()
    return {
        verb: {
            name.removeprefix("--"): argument.token_count()[1]
            for argument in command_of(app, verb).assemble_argument_collection()
            for name in argument.names[:1]
            if name.startswith("--")
        }
        for verb in _VERBS
    }


def _measured_run(folder: str) -> MeasuredRun:
    # Imported where it is called, so that --help stays quick.
    from loadstone.cli.measured import measured_run

    return measured_run(folder)


def _complain(message: str, status: int) -> int:
    print(f"loadstone: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
