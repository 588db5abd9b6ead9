"""Watches a model service while it runs: tells the gate of engines that came up, engines that are stuck to their
supervisor, and people what to change."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import psutil

from loadstone.cli.gating import say
from loadstone.hold.gate import Gate
from loadstone.serve.advice import Figures, advice
from loadstone.serve.lifecycle import State
from loadstone.serve.planning import Share
from loadstone.serve.supervisor import Supervisor

_LOOK_EVERY_S = 30.0
_SAY_AGAIN_AFTER_LOOKS = 20
_SILENT_IN_A_ROW = 3
"""Requests without a single byte until their time was up, none answered in between: the engine produces nothing."""


class ServiceWatch:
    """``advice`` is what /health shows: the lines in force, renewed twice a minute."""

    def __init__(
        self,
        supervisor: Supervisor,
        shares: Sequence[Share],
        configuration: Mapping[str, Any],
        changed: asyncio.Event,
    ) -> None:
        """``changed`` is set whenever a replica's state has changed."""
        self.advice: list[str] = []
        self._changed = changed
        self._supervisor = supervisor
        self._shares = shares
        self._configuration = configuration
        self._outcomes: Mapping[str, int] = {}
        self._said: dict[str, int] = {}
        self._processes: dict[int, psutil.Process] = {}

    def __repr__(self) -> str:
        return f"<ServiceWatch {len(self.advice)} lines of advice>"

    async def follow(self, gate: Gate) -> None:
        """Have the gate look at an engine as soon as it is up, not when its next probe is due."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            for replica in self._supervisor.replicas:
                if replica.state is State.UP:
                    gate.upstreams[replica.url].look_again()

    async def advise(self, gate: Gate) -> None:
        """Look at the figures again and again."""
        while True:
            self._restart_the_silent(gate)
            self._tell(advice(self._figures(gate)))
            await asyncio.sleep(_LOOK_EVERY_S)

    def _restart_the_silent(self, gate: Gate) -> None:
        for server in gate.upstreams.all():
            if server.silent_in_a_row >= _SILENT_IN_A_ROW:
                server.silent_in_a_row = 0
                self._supervisor.report_stalled(server.plan.url)

    def _tell(self, lines: Mapping[str, str]) -> None:
        """A subject is said when it comes up, and again after ten minutes; its figures may change meanwhile."""
        self.advice = list(lines.values())
        self._said = {subject: looks for subject, looks in self._said.items() if subject in lines}
        for subject, line in lines.items():
            looks = self._said.get(subject, 0)
            if looks % _SAY_AGAIN_AFTER_LOOKS == 0:
                say(f"advice: {line}")
            self._said[subject] = looks + 1

    def _figures(self, gate: Gate) -> Figures:
        stats = gate.status.stats(gate.now(), gate.now_ns() / 1e9, gate.resources())
        before, self._outcomes = self._outcomes or stats["outcomes"], stats["outcomes"]
        resources = gate.resources()
        engine_cpu = self._engine_cpu()
        preallocates = self._configuration["engine"] == "vllm"
        return Figures(
            timeouts=self._outcomes["request_timeout"] - before["request_timeout"],
            oldest_in_flight_s=stats["oldest_in_flight_s"],
            failed_share=stats["recent"]["error_rate"] or 0.0,
            mean_response_s=stats["latency_s"]["mean"],
            queue_full=self._outcomes["queue_full"] - before["queue_full"],
            queued=stats["queued"],
            max_queue=gate.enforced.limits.max_queue,
            gpu_memory=None if preallocates or resources.gpu is None else resources.gpu.memory,
            kv_use=max((one["kv_use"] for one in stats["upstreams"] if one["kv_use"] is not None), default=None),
            max_num_seqs=self._configuration["max_num_seqs"],
            engine_cpu=engine_cpu,
            free_cores=(1 - (resources.cpu or 0.0)) * (psutil.cpu_count() or 1),
            workers=self._configuration["workers"],
        )

    def _engine_cpu(self) -> float | None:
        """Share of its cores that the busiest replica has kept busy since the look before; None on GPUs."""
        shares = []
        for replica, share in zip(self._supervisor.replicas, self._shares, strict=True):
            if share.gpus or replica.pid is None:
                continue
            with suppress(psutil.NoSuchProcess):  # it has just ended; the supervisor tells
                process = self._processes.setdefault(replica.pid, psutil.Process(replica.pid))
                shares.append(process.cpu_percent(interval=None) / 100 / len(share.cores))
        return max(shares, default=None)
