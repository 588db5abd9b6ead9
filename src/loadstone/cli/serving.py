"""Runs a model service: replicas of an engine under a supervisor, and the gate in front of them."""

import asyncio
import contextlib
import http.client
import json
import os
import shlex
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvloop

from loadstone.cli.gating import prepare, run_gate, say
from loadstone.cli.service import Service, ServicePlan, plan
from loadstone.cli.service_watch import ServiceWatch
from loadstone.core.errors import EXIT_OK, UsageError
from loadstone.core.settings import GateSettings
from loadstone.serve.child import free_ports
from loadstone.serve.commands import Wanted, command, environment, in_force
from loadstone.serve.engines.checkpoint import read_config
from loadstone.serve.engines.vllm import check_int8
from loadstone.serve.machine import check_model, look_at_machine
from loadstone.serve.planning import Kind, Share
from loadstone.serve.replica import ReplicaPlan
from loadstone.serve.supervisor import Supervisor

_SHOWN = (
    *("quantization", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "gpu_memory_utilization"),
    *("tensor_parallel_size", "threads", "max_workers"),
)
"""Settings of the engine that /health shows."""
_ASK_TIMEOUT_S = 5.0
_PASSING = ("status", "batching")
"""What a replica tells of this moment."""


def serve_model(service: Service) -> int:
    """Run until SIGINT or SIGTERM. Raises UsageError before anything is started, UnreachableError where no engine
    starts."""
    check_model(service.model)
    planned = plan(service, look_at_machine(service.serve.vllm_python))
    for note in planned.notes:
        say(note)
    if service.serve.show:
        print("\n".join(_command_lines(planned)))
        return EXIT_OK
    _check_port(service.gate)
    if planned.wanted.engine == "vllm" and service.kind is Kind.CHAT and service.serve.quantization == "int8":
        check_int8(service.model, read_config(service.model))
    uvloop.run(_run(planned, _log_folder(service.serve.log_dir)))
    return EXIT_OK


def _command_lines(planned: ServicePlan) -> list[str]:
    """What would be started, as one would type it."""
    shares = planned.placement.shares
    lines = []
    for share, port in zip(shares, free_ports(len(shares)), strict=True):
        variables = [f"{key}={value}" for key, value in environment(share, os.environ).items()]
        lines.append(shlex.join([*variables, *command(planned.wanted, share, port)]))
    return lines


def _check_port(gate: GateSettings) -> None:
    """A port that is taken is found out before a model is loaded for minutes."""
    try:
        family = socket.AF_INET6 if ":" in gate.host else socket.AF_INET
        with socket.create_server((gate.host, gate.port), family=family):
            pass
    except OSError as error:
        raise UsageError(
            f"cannot listen on {gate.host}:{gate.port}: {error.strerror}; choose another --host or --port"
        ) from None


def _log_folder(told: str) -> Path:
    folder = Path(told or tempfile.mkdtemp(prefix="loadstone-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--log-dir {told} cannot be made: {error.strerror}") from None
    return folder


async def _run(planned: ServicePlan, logs: Path) -> None:
    wanted, shares = planned.wanted, planned.placement.shares
    changed = asyncio.Event()
    supervisor = Supervisor(_replicas(wanted, shares, logs), time.monotonic_ns, say, changed.set)
    configuration = _configuration(wanted, len(shares))
    watch = ServiceWatch(supervisor, shares, configuration, changed)

    def health() -> Mapping[str, Any]:
        return configuration | {"engines": supervisor.document(), "advice": watch.advice}

    urls = tuple(replica.url for replica in supervisor.replicas)
    ready = prepare(replace(planned.gate, upstreams=urls, service=health))
    say(f"starting {len(shares)} × {wanted.model}; logs in {logs}")
    try:
        await supervisor.start()
        configuration.update(await asyncio.to_thread(_told, urls))
        await run_gate(ready, watch.follow, watch.advise)
    finally:
        await supervisor.stop()


def _replicas(wanted: Wanted, shares: tuple[Share, ...], logs: Path) -> list[ReplicaPlan]:
    def commander(share: Share) -> Callable[[int], list[str]]:
        return lambda port: command(wanted, share, port)

    return [
        ReplicaPlan(
            name=f"{wanted.kind} engine {number}",
            command=commander(share),
            environment=environment(share, os.environ),
            ready_timeout_s=wanted.settings.ready_timeout_s,
            log_path=logs / f"{wanted.kind}-{number}.log",
        )
        for number, share in enumerate(shares, start=1)
    ]


def _configuration(wanted: Wanted, replicas: int) -> dict[str, Any]:
    told = {"service": str(wanted.kind), "model": wanted.model, "engine": wanted.engine, "workers": replicas}
    shown = {key: getattr(wanted.settings, key) for key in _SHOWN}
    return told | shown | in_force(wanted)


def _told(urls: tuple[str, ...]) -> dict[str, Any]:
    """What a replica of ours says is in force, such as the engine that it chose; others say nothing of it."""
    for url in urls:
        # One that is not up yet says nothing; the next may.
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=_ASK_TIMEOUT_S)
            connection.request("GET", "/health")
            document = json.loads(connection.getresponse().read())
            if isinstance(document, dict):
                return {key: value for key, value in document.items() if key not in _PASSING and value is not None}
    return {}
