"""``/embed_text`` and ``/embed_image``: vectors of texts, and of images in base64."""

from loadstone.core.api.endpoint import BodyOptions, Document, Endpoint, JsonObject, Prompt, never, without_choices


def _text_body(prompt: Prompt, output_tokens: int | None, options: BodyOptions) -> JsonObject:
    return _one_or_many("text", "texts", prompt)


def _image_body(prompt: Prompt, output_tokens: int | None, options: BodyOptions) -> JsonObject:
    return _one_or_many("image", "images", prompt)


def _one_or_many(one: str, many: str, prompt: Prompt) -> JsonObject:
    texts = prompt.texts
    return {one: texts[0]} if len(texts) == 1 else {many: list(texts)}


def _answered(document: Document) -> bool:
    return bool(document.embeddings)


EMBED_TEXT = Endpoint(
    name="embed_text",
    path="/embed_text",
    streams=False,
    body=_text_body,
    text_of=without_choices,
    carries_content=never,
    answered=_answered,
    names_model=False,
)

EMBED_IMAGE = Endpoint(
    name="embed_image",
    path="/embed_image",
    streams=False,
    body=_image_body,
    text_of=without_choices,
    carries_content=never,
    answered=_answered,
    names_model=False,
)
