"""What does not change while a gate runs."""

from dataclasses import dataclass, field

from loadstone.hold.api_keys import ApiKeys
from loadstone.hold.clients import TrustedProxies
from loadstone.hold.upstreams import Dialing


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
