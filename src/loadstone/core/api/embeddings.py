"""``/v1/embeddings``, and vLLM's ``/pooling``, which takes and gives the same."""

from loadstone.core.api.endpoint import BodyOptions, Document, Endpoint, JsonObject, Prompt, never, without_choices


def _body(prompt: Prompt, output_tokens: int | None, options: BodyOptions) -> JsonObject:
    texts = prompt.texts
    return {"model": options.model, "input": texts[0] if len(texts) == 1 else list(texts)}


def _answered(document: Document) -> bool:
    return bool(document.data)


EMBEDDINGS = Endpoint(
    name="embeddings",
    path="/v1/embeddings",
    streams=False,
    body=_body,
    text_of=without_choices,
    carries_content=never,
    answered=_answered,
)
