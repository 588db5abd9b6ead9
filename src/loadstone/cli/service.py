"""What a model service is told, and what follows from it on a machine: replicas, limits, notes. Nothing runs yet."""

from dataclasses import dataclass, replace

from loadstone.cli.gating import GateRun
from loadstone.core.errors import UsageError
from loadstone.core.limits import Limits
from loadstone.core.settings import GateSettings, LimitSettings, ServeSettings
from loadstone.hold.configuration import CAUTIOUS
from loadstone.serve.commands import Wanted
from loadstone.serve.machine import is_gguf
from loadstone.serve.planning import DEFAULT_MODEL, Kind, Machine, Placement, choose_engine, ineffective, place
from loadstone.serve.rerank_advice import SIZES, advice, size_of

_BATCH = 256
"""Requests in flight at a replica that batches, where nobody says how many sequences it computes at once."""
_QUEUE_PER_PLACE = 4
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Service:
    """Everything that one model service is told."""

    kind: Kind
    serve: ServeSettings
    limits: LimitSettings
    gate: GateSettings
    admin_key: str = ""
    model_size: str = ""
    cache_size: int | None = None
    image_url_allow: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        """The model that is given, or the default of its kind. Raises UsageError for a size that there is not."""
        if self.serve.model or self.kind is not Kind.RERANK:
            return self.serve.model or DEFAULT_MODEL[self.kind]
        if self.model_size not in SIZES:
            raise UsageError(f"--model-size {self.model_size}: there are {', '.join(SIZES)}")
        return SIZES[self.model_size].model

    def own_flags(self) -> tuple[str, ...]:
        """Flags of a replica that only this kind of service has."""
        flags: list[str] = []
        if self.cache_size is not None:
            flags += ["--cache-size", str(self.cache_size)]
        if self.cache_size and self.gate.redis:
            flags += ["--redis", self.gate.redis]
        for allowed in self.image_url_allow:
            flags += ["--image-url-allow", allowed]
        return tuple(flags)

    def defaults(self, replicas: int) -> Limits:
        """The limits where nothing is said: a chat model's are cautious; the others take what they can batch."""
        if self.kind is Kind.CHAT:
            return CAUTIOUS
        places = (self.serve.max_num_seqs or _BATCH) * replicas
        return Limits(max_concurrency=places, max_queue=_QUEUE_PER_PLACE * places, request_timeout_s=_TIMEOUT_S)


@dataclass(frozen=True)
class ServicePlan:
    """What would run."""

    gate: GateRun
    """Without upstreams: they are known when their ports are."""
    wanted: Wanted
    placement: Placement
    notes: tuple[str, ...]


def plan(service: Service, machine: Machine) -> ServicePlan:
    """Everything that can be known before anything starts. Raises UsageError for what cannot be."""
    engine = choose_engine(service.kind, service.serve, machine, gguf=is_gguf(service.model))
    placement = place(service.serve, machine, engine)
    replicas = len(placement.shares)
    gate = GateRun(
        (),
        service.limits,
        service.gate,
        service.admin_key,
        defaults=service.defaults(replicas),
        unlimited=service.serve.unlimited,
        together=True,
        chat=service.kind is Kind.CHAT,
    )
    concurrency = gate.limits_in_force().max_concurrency
    each = None if concurrency is None else -(-concurrency // replicas)
    wanted = Wanted(service.kind, engine, service.model, service.serve, each, service.own_flags())
    notes = [*placement.notes, *ineffective(service.kind, service.serve, engine)]
    if service.kind is Kind.RERANK:
        # What has no effect is not judged as well.
        judged = service.serve if engine == "vllm" else replace(service.serve, gpu_memory_utilization=None)
        notes += advice(judged, size_of(service.model), machine)
    return ServicePlan(gate, wanted, placement, tuple(notes))
