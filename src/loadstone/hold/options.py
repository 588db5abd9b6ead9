"""What does not change while a gate runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loadstone.hold.api_keys import ApiKeys
from loadstone.hold.clients import TrustedProxies
from loadstone.hold.upstreams import Dialing


def _nothing_more() -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class GateOptions:
    """Who may ask, and how upstreams are spoken to."""

    trusted: TrustedProxies = field(default_factory=TrustedProxies)
    api_keys: ApiKeys | None = None
    admin_key: str = ""
    affinity: bool = False
    adaptive: bool = False
    unlimited: bool = False
    """No quotas and no admission for anyone: for measuring what stands behind."""
    max_body_bytes: int = 16 * 1024 * 1024
    dialing: Dialing = field(default_factory=Dialing)
    service: Callable[[], Mapping[str, Any]] = _nothing_more
    """What /health tells besides: the configuration and the engines of the model service behind this gate."""
