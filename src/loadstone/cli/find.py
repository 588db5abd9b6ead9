"""``loadstone find``: the largest concurrency that the server takes, and the limits that follow from it."""

from typing import Annotated

from cyclopts import Parameter

from loadstone.cli.command import CommandLine
from loadstone.core.settings import DataSettings, LadderSettings, OutputSettings, RuleSettings, ServerSettings

FLAT = Parameter(name="*", negative=())
ApiKey = Annotated[str, Parameter(env_var=("LOADSTONE_API_KEY", "OPENAI_API_KEY"))]

_SERVER = ServerSettings()
_DATA = DataSettings()
_RULES = RuleSettings()
_LADDER = LadderSettings()
_OUTPUT = OutputSettings()


def find(
    *,
    server: Annotated[ServerSettings, FLAT] = _SERVER,
    data: Annotated[DataSettings, FLAT] = _DATA,
    rules: Annotated[RuleSettings, FLAT] = _RULES,
    ladder: Annotated[LadderSettings, FLAT] = _LADDER,
    output: Annotated[OutputSettings, FLAT] = _OUTPUT,
    api_key: ApiKey = "",
    admin_key: str = "",
    resume: str = "",
    command: CommandLine = "",
) -> int:
    """Find how many concurrent requests the server takes.

    Climbs a ladder of concurrencies until a rule fails, closes in on the line, confirms it, and writes a run folder
    with a report and a limits.toml.

    Exit status: 0 a line was found; 1 the server failed the rules at the first level, or refused the first request; 2
    usage; 3 the server cannot be reached; 4 no level could be judged; 130 interrupted, go on with --resume.

    Parameters
    ----------
    api_key
        Sent as a bearer token. Never written to disk.
    admin_key
        Of a Loadstone gate in front of the server: lifts its limits for these requests. Never written to disk.
    resume
        Go on with this run where it stopped, with its own settings.
    """
    from dataclasses import replace
    from datetime import datetime

    from loadstone.cli.searching import Secrets, conclude, search
    from loadstone.core.errors import UsageError
    from loadstone.measure.find import FindSettings, settings_of
    from loadstone.measure.runs import RunFolder, check_out, create_run, open_run

    def create(model: str) -> RunFolder:
        return create_run(output.out, model, datetime.now().astimezone())

    secrets = Secrets(api_key, admin_key)
    if resume:
        folder = open_run(resume)
        if folder.is_of_rate():
            raise UsageError(f"--resume {resume}: this is a run of rate, which starts anew: loadstone rate")
        settings = settings_of(folder.read_run(), resume)
        settings = replace(settings, server=replace(settings.server, header=server.header))
        searched = search(settings, lambda model: folder, secrets, command, quiet=output.quiet, earlier=folder.levels())
    else:
        check_out(output.out)
        settings = FindSettings(server, data, rules, ladder)
        searched = search(settings, create, secrets, command, quiet=output.quiet)
    return conclude(searched, quiet=output.quiet, json=output.json)
