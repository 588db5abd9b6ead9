"""The published description of the gate's own endpoints (OpenAPI 3.1). What is relayed is not ours to describe."""

from typing import Any

from loadstone import __version__
from loadstone.core.outcomes import Outcome

Schema = dict[str, Any]


def _object(properties: dict[str, Schema]) -> Schema:
    """Everything named is there; more may come with a later version."""
    return {"type": "object", "required": list(properties), "properties": properties}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return schema | {"type": [schema["type"], "null"]}


_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_TABLE: Schema = {"type": "object"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_FIGURE: Schema = {"type": "number", "minimum": 0}
_SHARE: Schema = _FIGURE | {"maximum": 1}

_ERROR = _object({"error": _object({"message": _TEXT, "type": _TEXT, "code": _TEXT, "param": _or_null(_TEXT)})})

_LIMITS = _object(
    {
        "max_concurrency": _or_null(_COUNT),
        "max_queue": _or_null(_COUNT),
        "queue_timeout_s": _or_null(_FIGURE),
        "request_timeout_s": _or_null(_FIGURE),
        "max_output_tokens": _or_null(_COUNT),
        "default_output_tokens": _or_null(_COUNT),
        "max_tokens_in_flight": _or_null(_COUNT),
        "per_client": _object(
            {
                "requests_per_minute": _or_null(_COUNT),
                "requests_per_hour": _or_null(_COUNT),
                "tokens_per_minute": _or_null(_COUNT),
            }
        ),
    }
)

_UPSTREAM = {
    "name": _TEXT,
    "up": _FLAG,
    "state": _TEXT,
    "in_flight": _COUNT,
    "limit": _or_null(_COUNT),
    "configured_limit": _or_null(_COUNT),
    "weight": _FIGURE,
    "reason": _TEXT,
    "kv_use": _or_null(_SHARE),
}
_ENDED = {"requests": _COUNT, "ok": _COUNT, "refused": _COUNT, "failed": _COUNT, "output_tokens": _COUNT}
_LATENCIES = _object({"n": _COUNT, **{name: _or_null(_FIGURE) for name in ("mean", "p50", "p95", "p99")}})
_NOW = {"version": _TEXT, "in_flight": _COUNT, "queued": _COUNT, "capacity": _or_null(_COUNT)}

_HEALTH = _object(
    {
        **_NOW,
        "status": {"enum": ["ok", "draining", "no upstream is up"]},
        "upstreams": _list(_object(_UPSTREAM)),
        "limits": _LIMITS,
        "warnings": _list(_TEXT),
    }
)

_STATS = _object(
    {
        **_NOW,
        "uptime_s": _FIGURE,
        "draining": _FLAG,
        "oldest_in_flight_s": _or_null(_FIGURE),
        "retry_after_s": _or_null(_FIGURE),
        "received": _COUNT,
        "admitted": _COUNT,
        "outcomes": _object({str(outcome): _COUNT for outcome in Outcome}),
        "failed": _COUNT,
        "refused": _COUNT,
        "error_rate": _or_null(_SHARE),
        "refusal_rate": _or_null(_SHARE),
        "output_tokens": _COUNT,
        "latency_s": _LATENCIES,
        "ttft_s": _LATENCIES,
        "queue_wait_s": _LATENCIES,
        "recent": _object(
            {
                "window_s": _FIGURE,
                "requests": _COUNT,
                "error_rate": _or_null(_SHARE),
                "refusal_rate": _or_null(_SHARE),
            }
        ),
        "last_minute": _object(
            {
                "span_s": _FIGURE,
                "requests_per_s": _FIGURE,
                "ok_per_s": _FIGURE,
                "refused_per_s": _FIGURE,
                "output_tokens_per_s": _FIGURE,
            }
        ),
        "upstreams": _list(_object(_UPSTREAM | _ENDED)),
        "clients": _object({"span_s": _FIGURE, "busiest": _list(_object({"client": _TEXT} | _ENDED))}),
        "resources": _object(
            {
                "cpu": _or_null(_SHARE),
                "memory": _or_null(_SHARE),
                "gpu": _or_null(_object({"memory": _or_null(_SHARE), "use": _or_null(_SHARE)})),
            }
        ),
        "limits": _LIMITS,
        "evidence": _or_null(_TABLE),
        "warnings": _list(_TEXT),
    }
)

_SCHEMES = {
    "admin": {"type": "apiKey", "in": "header", "name": "X-Loadstone-Admin"},
    "basic": {"type": "http", "scheme": "basic", "description": "Any user name; the password is the admin's key."},
}


def _json(description: str, schema: Schema) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _text(description: str, kind: str) -> Schema:
    return {"description": description, "content": {kind: {"schema": _TEXT}}}


def _page(name: str, summary: str, responses: dict[str, Schema]) -> Schema:
    return {"get": {"operationId": name, "summary": summary, "responses": responses}}


def _behind_the_key(page: Schema) -> Schema:
    """The same page, where the admin's key is wanted for it."""
    get = page["get"]
    refusal = _json("The admin's key is wanted, and was not given.", _ERROR)
    return {"get": get | {"responses": get["responses"] | {"401": refusal}, "security": [{n: []} for n in _SCHEMES]}}


_OPEN_PAGES = {
    "/health": _page(
        "health",
        "Is there anything to relay to? The configuration in force.",
        {"200": _json("At least one upstream is up.", _HEALTH), "503": _json("None is, or draining.", _HEALTH)},
    ),
    "/openapi.json": _page("openapi", "This description.", {"200": _json("OpenAPI 3.1.", _TABLE)}),
}
_ADMIN_PAGES = {
    "/stats": _page("stats", "Everything counted, as JSON.", {"200": _json("Figures.", _STATS)}),
    "/metrics": _page("metrics", "The same for Prometheus.", {"200": _text("Exposition.", "text/plain")}),
    "/ui": _page("ui", "The live page.", {"200": _text("The page.", "text/html")}),
}


def describe(*, protected: bool) -> Schema:
    """The description of a gate; ``protected``: the admin's key is wanted for its figures."""
    admin_pages = {path: _behind_the_key(page) if protected else page for path, page in _ADMIN_PAGES.items()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Loadstone gate",
            "version": __version__,
            "description": "The gate's own pages. Every other path is relayed to the model servers behind it.",
        },
        "paths": _OPEN_PAGES | admin_pages,
        "components": {"securitySchemes": _SCHEMES} if protected else {},
    }
