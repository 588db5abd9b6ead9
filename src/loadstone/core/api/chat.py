"""``/v1/chat/completions``."""

from loadstone.core.api.endpoint import BodyOptions, Choice, Document, Endpoint, JsonObject, Message, Prompt


def _body(prompt: Prompt, output_tokens: int | None, options: BodyOptions) -> JsonObject:
    messages = prompt.messages or [{"role": "user", "content": prompt.texts[0]}]
    body: JsonObject = {"model": options.model, "messages": messages}
    if output_tokens is not None:
        # Not max_completion_tokens: servers that don't know it ignore it, and generate to the end of their context.
        body["max_tokens"] = output_tokens
    return body


def _said(choice: Choice) -> Message | None:
    return choice.delta or choice.message


def _text_of(choice: Choice) -> str:
    said = _said(choice)
    if said is None:
        return ""
    parts = (said.reasoning_content or said.reasoning, said.content)
    return "".join(part for part in parts if isinstance(part, str))


def _carries_content(choice: Choice) -> bool:
    said = _said(choice)
    return said is not None and bool(said.content or said.reasoning_content or said.reasoning or said.tool_calls)


def _answered(document: Document) -> bool:
    return bool(document.choices)


CHAT = Endpoint(
    name="chat",
    path="/v1/chat/completions",
    streams=True,
    body=_body,
    text_of=_text_of,
    carries_content=_carries_content,
    answered=_answered,
)
