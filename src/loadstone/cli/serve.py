"""``loadstone serve chat | rerank | embed``: a model service behind its own gate, on one port, with limits on."""

from typing import Annotated

from cyclopts import Parameter

from loadstone.cli.find import FLAT
from loadstone.cli.gate import AdminKey
from loadstone.core.settings import EmbedGateSettings, LimitSettings, ServeSettings, ServiceGateSettings

_LIMITS = LimitSettings()
_SERVE = ServeSettings()
_GATE = ServiceGateSettings()
_EMBED_GATE = EmbedGateSettings()


def chat(
    *,
    serve: Annotated[ServeSettings, FLAT] = _SERVE,
    limits: Annotated[LimitSettings, FLAT] = _LIMITS,
    gate: Annotated[ServiceGateSettings, FLAT] = _GATE,
    admin_key: AdminKey = "",
) -> int:
    """Serve a chat model as OpenAI does: /v1/chat/completions, /v1/completions, /v1/models.

    --engine: vllm, llamacpp (a GGUF file), transformers; auto takes vLLM where there is a GPU and vLLM, llama.cpp for a
    GGUF file, transformers otherwise. --model is Qwen/Qwen3-8B where none is given.

    Without --limits: 3 in flight, a queue of 10, 10 requests a minute and 100 an hour for each client, 512 output
    tokens (100 where the request names none), 120 s. A limit is that of the whole service, however many --workers.

    Exit status: 0 stopped; 2 usage, a limits file that cannot be used; 3 the engine did not start.

    Parameters
    ----------
    admin_key
        Key of the administrator: wanted for /stats, /metrics and /ui, and lifts all limits for a measuring client.
    """
    from loadstone.cli.service import Service
    from loadstone.cli.serving import serve_model
    from loadstone.serve.planning import Kind

    return serve_model(Service(Kind.CHAT, serve, limits, gate, admin_key))


def rerank(
    *,
    model_size: str = "0.6B",
    serve: Annotated[ServeSettings, FLAT] = _SERVE,
    limits: Annotated[LimitSettings, FLAT] = _LIMITS,
    gate: Annotated[ServiceGateSettings, FLAT] = _GATE,
    admin_key: AdminKey = "",
) -> int:
    """Serve a reranker: /rerank, /v1/rerank, /v2/rerank, /score.

    --engine: vllm, transformers (Qwen3-Reranker), cross-encoder (any of sentence-transformers); auto takes vLLM where
    there is a GPU and vLLM, and otherwise what the model's configuration says.

    No quotas; in flight as many as the engine batches (--max-num-seqs, or 256), a queue of four times that.

    Exit status: 0 stopped; 2 usage, a limits file that cannot be used; 3 the engine did not start.

    Parameters
    ----------
    model_size
        Qwen3-Reranker of this size, where no --model is given: 0.6B, 4B or 8B.
    admin_key
        Key of the administrator: wanted for /stats, /metrics and /ui, and lifts all limits for a measuring client.
    """
    from loadstone.cli.service import Service
    from loadstone.cli.serving import serve_model
    from loadstone.serve.planning import Kind

    return serve_model(Service(Kind.RERANK, serve, limits, gate, admin_key, model_size=model_size))


def embed(
    *,
    cache_size: int = 10_000,
    image_url_allow: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    serve: Annotated[ServeSettings, FLAT] = _SERVE,
    limits: Annotated[LimitSettings, FLAT] = _LIMITS,
    gate: Annotated[EmbedGateSettings, FLAT] = _EMBED_GATE,
    admin_key: AdminKey = "",
) -> int:
    """Serve embeddings of text and images: /embed_text, /embed_image, /v1/embeddings.

    --engine: sentence (any model of sentence-transformers), siglip (SigLIP2, text and image); auto looks at the model's
    configuration. --model is google/siglip2-so400m-patch16-naflex where none is given.

    No quotas; in flight as many as the engine batches (--max-num-seqs, or 256), a queue of four times that.

    Exit status: 0 stopped; 2 usage, a limits file that cannot be used; 3 the engine did not start.

    Parameters
    ----------
    cache_size
        Results kept for inputs that come again, in memory or, with --redis, there; 0 keeps none.
    image_url_allow
        Internal host or network (CIDR) that images may be fetched from, such as an object store. Repeatable.
    admin_key
        Key of the administrator: wanted for /stats, /metrics and /ui, and lifts all limits for a measuring client.
    """
    from loadstone.cli.service import Service
    from loadstone.cli.serving import serve_model
    from loadstone.serve.planning import Kind

    return serve_model(
        Service(Kind.EMBED, serve, limits, gate, admin_key, cache_size=cache_size, image_url_allow=image_url_allow)
    )
