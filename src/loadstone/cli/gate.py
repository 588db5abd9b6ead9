"""``loadstone gate``: a reverse proxy that holds model servers to their limits."""

from typing import Annotated

from cyclopts import Parameter

from loadstone.cli.find import FLAT
from loadstone.core.settings import GateSettings, LimitSettings

_LIMITS = LimitSettings()
_GATE = GateSettings()

AdminKey = Annotated[str, Parameter(env_var=("LOADSTONE_ADMIN_KEY",))]
UpstreamKey = Annotated[str, Parameter(env_var=("LOADSTONE_UPSTREAM_KEY",))]


def gate(
    *,
    upstream: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    limits: Annotated[LimitSettings, FLAT] = _LIMITS,
    gate: Annotated[GateSettings, FLAT] = _GATE,
    admin_key: AdminKey = "",
    upstream_key: UpstreamKey = "",
) -> int:
    """Admit what the model servers can take, queue a little, refuse the rest at once and say when to come back.

    Without --limits: 3 in flight at each upstream, a queue of 10, 10 requests a minute and 100 an hour for each client,
    512 output tokens, 120 s. The limits file is read again when it changes, or on SIGHUP; SIGTERM drains. Live page:
    /ui; figures: /stats, /metrics; state: /health.

    Exit status: 0 stopped; 2 usage, a limits file that cannot be used, limits above the measured line.

    Parameters
    ----------
    upstream
        Model server to relay to, such as http://127.0.0.1:8001. Repeatable; adds to those of the limits file.
    admin_key
        Key of the administrator: wanted for /stats, /metrics and /ui, and lifts all limits for a measuring client.
    upstream_key
        Sent to the upstreams as a bearer token, in place of the client's.
    """
    from loadstone.cli.gating import GateRun, serve_gate

    return serve_gate(GateRun(upstream, limits, gate, admin_key, upstream_key))
