"""``loadstone rate``: the smallest concurrency that sustains a request rate."""

from typing import Annotated

from loadstone.cli.command import CommandLine
from loadstone.cli.find import FLAT, ApiKey
from loadstone.core.settings import DataSettings, OutputSettings, ServerSettings

_SERVER = ServerSettings()
_DATA = DataSettings()
_OUTPUT = OutputSettings()


def rate(
    *,
    target_qps: float,
    num_prompts: int = 1000,
    levels: str = "10,20,50,100,200",
    resolution: float = 0.05,
    min_success: float = 0.95,
    server: Annotated[ServerSettings, FLAT] = _SERVER,
    data: Annotated[DataSettings, FLAT] = _DATA,
    output: Annotated[OutputSettings, FLAT] = _OUTPUT,
    api_key: ApiKey = "",
    admin_key: str = "",
    command: CommandLine = "",
) -> int:
    """Find the smallest concurrency that sustains a request rate.

    Climbs a ladder of concurrencies, each slot always busy, to the first that delivers at least 95 % of the target;
    closes in on the smallest that does; then sends the target itself at it, arriving at random.

    Exit status: 0 a concurrency was found; 1 the target is never reached, or the server refused the first request; 2
    usage; 3 the server cannot be reached; 4 no level could be judged; 130 interrupted.

    Parameters
    ----------
    target_qps
        Requests per second to sustain.
    num_prompts
        Requests of the run at the target rate.
    levels
        Concurrencies to climb through, ascending.
    resolution
        How finely the concurrency is found.
    min_success
        Least share of requests that must succeed.
    api_key
        Sent as a bearer token. Never written to disk.
    admin_key
        Of a Loadstone gate in front of the server: lifts its limits for these requests. Never written to disk.
    """
    from datetime import datetime

    from loadstone.cli.rating import conclude_rate, search_rate
    from loadstone.cli.searching import Secrets
    from loadstone.core.settings import LadderSettings, RuleSettings
    from loadstone.measure.find import FindSettings
    from loadstone.measure.rate_run import RateSettings
    from loadstone.measure.runs import RunFolder, check_out, create_run

    def create(model: str) -> RunFolder:
        return create_run(output.out, model, datetime.now().astimezone())

    rules = RuleSettings(min_success=min_success, resolution=resolution)
    settings = RateSettings(target_qps, num_prompts, FindSettings(server, data, rules, LadderSettings(levels=levels)))
    settings.goal()
    check_out(output.out)
    rated = search_rate(settings, create, Secrets(api_key, admin_key), command, quiet=output.quiet)
    return conclude_rate(rated, quiet=output.quiet, json=output.json)
