"""A gate's ``/stats`` on a terminal: a screen that is drawn again and again, or one line. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

Stats = Mapping[str, Any]
"""The document of ``/stats``."""

_BAR_WIDTH = 12
_CLIENTS_SHOWN = 5
_KV_OR_GPU_LIMIT = 0.9
_QUEUE_LIMIT = 5
_FAILURES_LIMIT = 0.01
_MEAN_RESPONSE_LIMIT_S = 5.0
_STATE_STYLES = {"up": "green", "down": "red", "open circuit": "red"}


def screen(stats: Stats, address: str, trouble: str = "") -> RenderableType:
    """All of it. ``trouble``: why the figures are not of now."""
    parts: list[RenderableType] = [_head(stats, address)]
    if trouble:
        parts.append(Text(f"no answer: {shown(trouble)}", style="bold red"))
    parts += [Text(f"! {shown(warning)}", style="yellow") for warning in stats["warnings"]]
    parts += [Text(""), _now(stats), _thresholds(stats), Text(""), _upstreams(stats["upstreams"])]
    parts += [Text(""), _latencies(stats), Text(""), _outcomes(stats)]
    if stats["clients"]["busiest"]:
        parts += [Text(""), _clients(stats["clients"])]
    return Padding(Group(*parts), (0, 1))


def line(stats: Stats) -> str:
    """The figures of one moment on one line, for a log."""
    ttft, latency, minute = stats["ttft_s"], stats["latency_s"], stats["last_minute"]
    down = [shown(upstream["name"]) for upstream in stats["upstreams"] if not upstream["up"]]
    parts = [
        f"in flight {_of(stats['in_flight'], stats['capacity'])}",
        f"queued {_of(stats['queued'], stats['limits'].get('max_queue'))}",
        f"{number(minute['requests_per_s'])} req/s",
        f"refused {percent(stats['recent']['refusal_rate'])}",
        f"failed {percent(stats['recent']['error_rate'])}",
        f"TTFT p50 {seconds(ttft['p50'])} p99 {seconds(ttft['p99'])}",
        f"response mean {seconds(latency['mean'])} p99 {seconds(latency['p99'])}",
        *(["draining"] if stats["draining"] else []),
        *([f"down: {', '.join(down)}"] if down else []),
    ]
    return "  ".join(parts)


# -- values in words


def shown(text: str) -> str:
    """Without control characters: names come from clients, and a terminal would obey them."""
    return "".join(character if character.isprintable() else "�" for character in text)


def number(value: float | None) -> str:
    """Three digits at most behind the point, none where it is whole: 0.12, 12.3, 1,234."""
    if value is None:
        return "–"
    if value >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{number(share * 100)} %"


def seconds(value_s: float | None) -> str:
    """12 ms, 1.2 s, 5 min, 3 h, 2 days."""
    if value_s is None:
        return "–"
    if value_s < 1:
        return f"{number(round(value_s * 1000, 1))} ms"
    for unit, size_s, up_to in (("s", 1, 120), ("min", 60, 7_200), ("h", 3_600, 172_800)):
        if value_s < up_to:
            return f"{number(value_s) if size_s == 1 else round(value_s / size_s)} {unit}"
    return f"{value_s / 86_400:.0f} days"


def _of(value: float, bound: float | None) -> str:
    return f"{number(value)}/{'∞' if bound is None else number(bound)}"


# -- parts


def _head(stats: Stats, address: str) -> Text:
    state, style = _state(stats)
    facts = f"  {address}  version {stats['version']}, up for {seconds(stats['uptime_s'])}"
    return Text.assemble(("Loadstone gate", "bold"), "  ", (state, f"bold {style}"), (facts, "dim"))


def _state(stats: Stats) -> tuple[str, str]:
    up = sum(upstream["up"] for upstream in stats["upstreams"])
    if stats["draining"]:
        return "draining", "yellow"
    if not up:
        return "no upstream is up", "red"
    if up < len(stats["upstreams"]):
        return f"{up} of {len(stats['upstreams'])} upstreams up", "yellow"
    return "live", "green"


def _now(stats: Stats) -> Table:
    limits, minute, recent = stats["limits"], stats["last_minute"], stats["recent"]
    grid = _grid()
    oldest = stats["oldest_in_flight_s"]
    back = stats["retry_after_s"]
    grid.add_row(
        "in flight",
        _bar(stats["in_flight"], stats["capacity"]),
        _of(stats["in_flight"], stats["capacity"]),
        "" if oldest is None else f"the oldest for {seconds(oldest)}",
    )
    grid.add_row(
        "queue",
        _bar(stats["queued"], limits.get("max_queue")),
        _of(stats["queued"], limits.get("max_queue")),
        "" if back is None else f"a refused client is told to wait {seconds(back)}",
    )
    rates = (f"{number(minute[f'{kind}_per_s'])} {word}" for kind, word in _RATES.items())
    grid.add_row("req/s", "", number(minute["requests_per_s"]), " · ".join(rates))
    refused = f"over five minutes; {number(stats['refused'])} since the start"
    grid.add_row("refused", "", percent(recent["refusal_rate"]), refused)
    return grid


_RATES = {"ok": "ok", "refused": "refused", "output_tokens": "tokens/s"}


def _thresholds(stats: Stats) -> Table:
    """The four figures that the deployment guide says to watch."""
    known = [upstream["kv_use"] for upstream in stats["upstreams"] if upstream["kv_use"] is not None]
    gpu = stats["resources"]["gpu"]
    memory, name = (max(known), "KV cache") if known else (gpu and gpu["memory"], "GPU memory")
    failures = stats["recent"]["error_rate"] if stats["admitted"] else None
    grid = _grid()
    for label, value, limit, show in (
        (name, memory, _KV_OR_GPU_LIMIT, percent),
        ("queue length", stats["queued"], _QUEUE_LIMIT, number),
        ("failures", failures, _FAILURES_LIMIT, percent),
        ("mean response", stats["latency_s"]["mean"], _MEAN_RESPONSE_LIMIT_S, seconds),
    ):
        word, style = (
            ("not known", "dim") if value is None else ("ok", "green") if value < limit else ("high", "yellow")
        )
        grid.add_row(label, Text(word, style=style), show(value), f"keep below {show(limit)}")
    return grid


def _upstreams(upstreams: Sequence[Stats]) -> Table:
    table = _table("upstream", "state", "in flight", "requests", "failed", "why")
    for upstream in upstreams:
        table.add_row(
            Text(shown(upstream["name"])),
            Text(upstream["state"], style=_STATE_STYLES.get(upstream["state"], "yellow")),
            _of(upstream["in_flight"], upstream["limit"]),
            number(upstream["requests"]),
            number(upstream["failed"]),
            Text(shown(upstream["reason"]), style="dim"),
        )
    return table


def _latencies(stats: Stats) -> Table:
    table = _table("last five minutes", "mean", "p50", "p95", "p99", "n")
    for name, key in (("TTFT", "ttft_s"), ("response", "latency_s"), ("queue wait", "queue_wait_s")):
        figures = stats[key]
        table.add_row(name, *(seconds(figures[p]) for p in ("mean", "p50", "p95", "p99")), number(figures["n"]))
    return table


def _outcomes(stats: Stats) -> Text:
    met = [f"{number(count)} {name.replace('_', ' ')}" for name, count in stats["outcomes"].items() if count]
    ended = " · ".join(met) or "nothing has ended yet"
    return Text.assemble(("ended  ", "bold"), ended, (f"  of {number(stats['received'])} received", "dim"))


def _clients(clients: Stats) -> Table:
    table = _table(f"busiest clients, last {seconds(clients['span_s'])}", "requests", "ok", "refused", "failed")
    for client in clients["busiest"][:_CLIENTS_SHOWN]:
        counts = (number(client[key]) for key in ("requests", "ok", "refused", "failed"))
        table.add_row(Text(shown(client["client"])), *counts)
    return table


def _bar(value: float, bound: float | None) -> Text:
    """Empty where there is no bound to fill."""
    if bound is None:
        return Text("")
    filled = min(_BAR_WIDTH, round(_BAR_WIDTH * value / bound)) if bound else 0
    style = "yellow" if value >= bound else "cyan"
    return Text.assemble(("━" * filled, style), ("━" * (_BAR_WIDTH - filled), "bright_black"))


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", width=13)
    grid.add_column(width=_BAR_WIDTH)
    grid.add_column(justify="right", min_width=8)
    grid.add_column(style="dim")
    return grid


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first, max_width=44, no_wrap=True, overflow="ellipsis")
    for name in others:
        # Only the reason may take more lines than one.
        table.add_column(name, justify="left" if name in ("state", "why") else "right", no_wrap=name != "why")
    return table
