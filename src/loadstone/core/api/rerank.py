"""``/v1/rerank``."""

from loadstone.core.api.endpoint import BodyOptions, Document, Endpoint, JsonObject, Prompt, never, without_choices


def _body(prompt: Prompt, output_tokens: int | None, options: BodyOptions) -> JsonObject:
    query, *documents = prompt.texts
    return {"model": options.model, "query": query, "documents": documents}


def _answered(document: Document) -> bool:
    return bool(document.results)


RERANK = Endpoint(
    name="rerank",
    path="/v1/rerank",
    streams=False,
    body=_body,
    text_of=without_choices,
    carries_content=never,
    answered=_answered,
)
