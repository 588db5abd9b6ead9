"""``/v1/completions``."""

from loadstone.core.api.endpoint import BodyOptions, Choice, Document, Endpoint, JsonObject, Prompt


def _body(prompt: Prompt, output_tokens: int | None, options: BodyOptions) -> JsonObject:
    body: JsonObject = {"model": options.model, "prompt": prompt.texts[0]}
    if output_tokens is not None:
        body["max_tokens"] = output_tokens
    return body


def _text_of(choice: Choice) -> str:
    return choice.text or ""


def _carries_content(choice: Choice) -> bool:
    return bool(choice.text)


def _answered(document: Document) -> bool:
    return bool(document.choices)


COMPLETIONS = Endpoint(
    name="completions",
    path="/v1/completions",
    streams=True,
    body=_body,
    text_of=_text_of,
    carries_content=_carries_content,
    answered=_answered,
)
