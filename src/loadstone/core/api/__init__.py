"""The endpoint families: how a body is built and a reply is read."""

from loadstone.core.api.chat import CHAT
from loadstone.core.api.completions import COMPLETIONS
from loadstone.core.api.embed import EMBED_IMAGE, EMBED_TEXT
from loadstone.core.api.embeddings import EMBEDDINGS
from loadstone.core.api.endpoint import Endpoint
from loadstone.core.api.rerank import RERANK

ENDPOINTS: dict[str, Endpoint] = {
    "chat": CHAT,
    "completions": COMPLETIONS,
    "embeddings": EMBEDDINGS,
    "rerank": RERANK,
    "embed_text": EMBED_TEXT,
    "embed_image": EMBED_IMAGE,
}
