"""What ``vllm bench serve`` calls a backend and an endpoint, in our terms."""

from loadstone.core.api import ENDPOINTS
from loadstone.core.api.endpoint import Endpoint
from loadstone.core.errors import UsageError

BACKENDS: dict[str, tuple[str, str]] = {
    "vllm": ("completions", "/v1/completions"),
    "openai": ("completions", "/v1/completions"),
    "openai-chat": ("chat", "/v1/chat/completions"),
    "openai-embeddings": ("embeddings", "/v1/embeddings"),
    "vllm-pooling": ("embeddings", "/pooling"),
    "vllm-rerank": ("rerank", "/v1/rerank"),
    "infinity-embeddings": ("embeddings", "/embeddings"),
}
"""Backend → (endpoint family, path)."""

_FAMILIES = {
    "/chat/completions": "chat",
    "/completions": "completions",
    "/embeddings": "embeddings",
    "/pooling": "embeddings",
    "/rerank": "rerank",
    "/embed_text": "embed_text",
    "/embed_image": "embed_image",
}
"""End of a path → endpoint family; the first that fits."""


def resolve_endpoint(backend: str, endpoint: str | None) -> tuple[Endpoint, str]:
    """(family, path) of ``--backend`` and ``--endpoint``; an endpoint is one of our names or a path.

    A path that tells its family overrides the backend's. Raises :class:`UsageError`.
    """
    if backend not in BACKENDS:
        raise UsageError(f"--backend {backend} is unknown; choose of {', '.join(BACKENDS)}")
    family, path = BACKENDS[backend]
    if endpoint is None:
        return ENDPOINTS[family], path
    if endpoint in ENDPOINTS:
        return ENDPOINTS[endpoint], ENDPOINTS[endpoint].path
    if not endpoint.startswith("/"):
        raise UsageError(f"--endpoint {endpoint} is neither a path (/v1/…) nor one of {', '.join(ENDPOINTS)}")
    told = next((name for end, name in _FAMILIES.items() if endpoint.endswith(end)), family)
    return ENDPOINTS[told], endpoint
