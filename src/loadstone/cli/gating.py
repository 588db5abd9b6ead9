"""Composes a gate from settings, and keeps it running: reload, drain, the line that says it is ready."""

import asyncio
import signal
import ssl
import sys
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from loadstone.core import limits as limits_file
from loadstone.core.errors import EXIT_OK, UsageError
from loadstone.core.limits import Limits, LimitsFile
from loadstone.core.settings import GateSettings, LimitSettings, check_range
from loadstone.hold.access_log import AccessLog
from loadstone.hold.api_keys import ApiKeys
from loadstone.hold.clients import TrustedProxies
from loadstone.hold.configuration import CAUTIOUS, Enforced, enforce, limits_in_force, model_warning
from loadstone.hold.gate import Gate
from loadstone.hold.options import GateOptions
from loadstone.hold.upstreams import Dialing
from loadstone.wire.clock import MonotonicClock
from loadstone.wire.process import raise_open_files

if TYPE_CHECKING:
    from loadstone.hold.shared_quota import SharedQuotas

_LOOK_EVERY_S = 1.0

Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class GateRun:
    """Everything that one gate is told."""

    upstreams: tuple[str, ...]
    limits: LimitSettings
    gate: GateSettings
    admin_key: str = ""
    upstream_key: str = ""
    defaults: Limits = CAUTIOUS
    unlimited: bool = False
    together: bool = False
    """The upstreams are replicas of one service, and the limit is that of all of them."""
    chat: bool = True
    """A chat model is served, unless the limits file says otherwise."""
    service: Callable[[], Mapping[str, Any]] = dict
    """What /health tells besides."""

    def enforced(self) -> Enforced:
        """The limits in force by the file as it is now. Raises UsageError."""
        file, name = self._file(), self.limits.limits
        now = datetime.now(UTC)
        return enforce(
            file, name, self.limits, self.upstreams, now, self.defaults, together=self.together, chat=self.chat
        )

    def limits_in_force(self) -> Limits:
        """The limits alone, before there is any upstream. Raises UsageError."""
        return limits_in_force(self._file(), self.limits, self.defaults)

    def _file(self) -> LimitsFile | None:
        name = self.limits.limits
        return _read_limits(name) if name else None

    def options(self) -> GateOptions:
        """What stays for the gate's lifetime. Raises UsageError."""
        settings = self.gate
        check_range("--max-body-mb", settings.max_body_mb, 0.001, 4096)
        keys = ApiKeys.from_file(settings.api_key_file) if settings.api_key_file else None
        authorization = f"Bearer {self.upstream_key}".encode() if self.upstream_key else None
        return GateOptions(
            trusted=TrustedProxies.parse(settings.trusted_proxy),
            api_keys=keys,
            admin_key=self.admin_key,
            affinity=settings.affinity,
            adaptive=settings.adaptive,
            unlimited=self.unlimited,
            service=self.service,
            max_body_bytes=int(settings.max_body_mb * 1024 * 1024),
            dialing=Dialing(
                authorization=authorization,
                tls=_tls(settings.upstream_ca),
            ),
        )


def serve_gate(run: GateRun) -> int:
    """Run until SIGINT or SIGTERM. Raises UsageError for what cannot be used, before anything listens."""
    ready = prepare(run)
    uvloop.run(run_gate(ready))
    return EXIT_OK


@dataclass(frozen=True)
class ReadyGate:
    """A gate whose settings have been found to be usable; nothing listens yet."""

    run: GateRun
    enforced: Enforced
    options: GateOptions
    access_log: AccessLog | None
    seen: Stamp | None
    """The stamp of the limits file before it was first read, so that a change in between is noticed."""


def prepare(run: GateRun) -> ReadyGate:
    """Read and check everything that a gate is told, and raise the limit of open files. Raises UsageError."""
    seen = _stamp(run.limits.limits)
    enforced, options = run.enforced(), run.options()
    access_log = AccessLog(run.gate.access_log) if run.gate.access_log else None
    raise_open_files()
    return ReadyGate(run, enforced, options, access_log, seen)


async def run_gate(ready: ReadyGate, *beside: Callable[[Gate], Coroutine[Any, Any, None]]) -> None:
    """Listen until SIGINT or SIGTERM, then drain; ``beside`` runs as long as the gate takes requests.

    Raises UsageError where the address cannot be had.
    """
    run, enforced, options = ready.run, ready.enforced, ready.options
    loop = asyncio.get_running_loop()
    clock = MonotonicClock(loop)
    shared = _shared_quotas(run.gate.redis, enforced, clock) if run.gate.redis else None
    gate = Gate(enforced, options, clock, say, access_log=ready.access_log, shared_quotas=shared)
    stopped, reload = asyncio.Event(), asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stopped.set)
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    for warning in enforced.warnings:
        say(warning)
    host = run.gate.host
    try:
        port = await gate.start(host, run.gate.port)
    except OSError as error:
        await gate.stop()
        clock.close()
        raise UsageError(
            f"cannot listen on {host}:{run.gate.port}: {error.strerror}; choose another --host or --port"
        ) from None
    shown = f"[{host}]" if ":" in host else host
    print(f"loadstone: ready on http://{shown}:{port}", flush=True)
    running = (_keep_limits(gate, run, reload, ready.seen), _compare_models(gate), *(more(gate) for more in beside))
    watching = [loop.create_task(each) for each in running]
    await stopped.wait()
    # A second signal ends at once.
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.remove_signal_handler(signum)
    for task in watching:
        task.cancel()
    await asyncio.gather(*watching, return_exceptions=True)
    if gate.in_flight:
        say(f"draining: {gate.in_flight} requests run or wait")
    await gate.drain(run.gate.drain_timeout_s or None)
    clock.close()


def _shared_quotas(url: str, enforced: Enforced, clock: MonotonicClock) -> "SharedQuotas":
    # Importing Redis takes as long as everything else together, and few need it.
    from loadstone.hold.shared_quota import SharedQuotas

    return SharedQuotas(url, enforced.quotas, clock, say)


async def _keep_limits(gate: Gate, run: GateRun, reload: asyncio.Event, seen: Stamp | None) -> None:
    """Put a changed limits file in force; one that cannot be used changes nothing, and is told."""
    path = run.limits.limits
    while True:
        try:
            async with asyncio.timeout(_LOOK_EVERY_S):
                await reload.wait()
        except TimeoutError:
            if (now := _stamp(path)) == seen or now is None:
                continue
            seen = now
        asked, seen = reload.is_set(), _stamp(path)
        reload.clear()
        try:
            enforced = run.enforced()
        except UsageError as error:
            gate.warn("limits", f"the limits in force stay, the file cannot be used: {error}")
            continue
        gate.warn("limits", "")
        gate.apply(enforced)
        say(f"limits {'read again' if asked else 'changed'}: {_in_words(enforced)}")
        for warning in enforced.warnings:
            say(warning)
        await _compare_models(gate)


def _stamp(path: str) -> Stamp | None:
    """Changes whenever the file does; None where there is none to look at."""
    try:
        stat = Path(path).stat() if path else None
    except OSError:
        return None
    return None if stat is None else (stat.st_mtime_ns, stat.st_size, stat.st_ino)


async def _compare_models(gate: Gate) -> None:
    """Warn where an upstream serves another model than the limits were measured for."""
    for server in gate.upstreams.all():
        served = await server.models()
        gate.warn(f"model {server.plan.url}", model_warning(gate.enforced.evidence, server.plan.url, served))


def _in_words(enforced: Enforced) -> str:
    each = ", ".join(f"{plan.max_concurrency or 'no bound'} at {plan.url}" for plan in enforced.upstreams)
    return f"{each}; queue {'no bound' if enforced.limits.max_queue is None else enforced.limits.max_queue}"


def _read_limits(name: str) -> LimitsFile:
    try:
        text = Path(name).read_text("utf-8")
    except OSError as error:
        raise UsageError(f"--limits {name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--limits {name} is not TOML: it is not UTF-8 text") from None
    return limits_file.loads(text, name)


def _tls(authority: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=authority or None)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"--upstream-ca {authority} cannot be used: {error}") from None


def say(line: str) -> None:
    """One line for whoever runs the gate."""
    print(f"loadstone: {line}", file=sys.stderr, flush=True)
