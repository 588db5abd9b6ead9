"""One request's way through the admission: what it wants, where it stands, and how it ended."""

import enum
from collections import OrderedDict

from loadstone.core.placement import Upstream


class Refusal(enum.Enum):
    """Why a request is not admitted; the values are the codes of the API."""

    QUEUE_FULL = "queue_full"
    QUEUE_TIMEOUT = "queue_timeout"
    """Waited for longer than the queue's bound, or too long to be served before its deadline."""
    EXPECTED_WAIT = "expected_wait"
    """Refused at once: it would have come to a QUEUE_TIMEOUT or REQUEST_TIMEOUT."""
    NO_UPSTREAM = "no_upstream"
    """No upstream that could take it is up."""
    OVER_BUDGET = "over_budget"
    """Dearer than the whole token budget of every upstream."""
    REQUEST_TIMEOUT = "request_timeout"
    """Its deadline passed before it was granted."""


class State(enum.Enum):
    """QUEUED → GRANTED → ENDED; REFUSED from QUEUED; GRANTED → QUEUED by a move."""

    QUEUED = "queued"
    GRANTED = "granted"
    REFUSED = "refused"
    ENDED = "ended"


_QUEUED = State.QUEUED


class Want:
    """What a request asks for."""

    __slots__ = ("affinity", "client", "deadline_ns", "priority", "tokens", "unlimited")

    def __init__(
        self,
        client: str,
        deadline_ns: int,
        tokens: int = 0,
        priority: int = 0,
        affinity: int | None = None,
        unlimited: bool = False,
    ) -> None:
        self.client = client
        self.deadline_ns = deadline_ns
        """Monotonic: when the whole request must have ended."""
        self.tokens = tokens
        """Prompt and max output together."""
        self.priority = priority
        """Higher goes first."""
        self.affinity = affinity
        """Hash of the prompt's prefix; equal ones prefer one upstream."""
        self.unlimited = unlimited
        """Granted at once wherever anything is up, and against no limit: for a measuring client."""


class Share:
    """A client's standing within one priority: what it was served, and its waiting tickets, first come first."""

    __slots__ = ("client", "counter", "running", "waiting")

    def __init__(self, client: str) -> None:
        self.client = client
        self.counter = 0
        self.running = 0
        self.waiting: OrderedDict[Ticket, None] | None = None
        """Made at the first wait: most clients never do."""

    def __repr__(self) -> str:
        return f"<Share of {self.client}: {self.counter}, {self.running} running, {len(self.waiting or ())} waiting>"


class Ticket:
    """One request; compared by identity. Read it; only ``Admission`` changes it."""

    __slots__ = (
        "avoid",
        "charge",
        "granted_ns",
        "number",
        "offered_ns",
        "place",
        "queued_ns",
        "refusal",
        "share",
        "state",
        "tokens",
        "want",
    )

    def __init__(self, want: Want, offered_ns: int, tokens: int) -> None:
        self.want = want
        self.offered_ns = offered_ns
        self.tokens = tokens
        """What it takes of the budget while GRANTED."""
        self.state = _QUEUED
        self.refusal: Refusal | None = None
        """Why, while REFUSED."""
        self.granted_ns: int | None = None
        """When it was last granted."""
        self.place: Upstream | None = None
        self.share: Share | None = None
        """Set once it has been charged for."""
        self.charge = 0
        self.queued_ns = 0
        """Since when it waits; anew after a move."""
        self.number = 0
        """Its order in the queue."""
        self.avoid: frozenset[str] | None = None
        """While it waits after a move: where it may not go."""

    @property
    def upstream(self) -> str | None:
        """Where it runs, while GRANTED."""
        return None if self.place is None else self.place.name

    def __repr__(self) -> str:
        detail = f" at {self.upstream}" if self.place else f" {self.refusal.value}" if self.refusal else ""
        return f"<Ticket of {self.want.client} {self.state.value}{detail}, {self.tokens} tokens>"
