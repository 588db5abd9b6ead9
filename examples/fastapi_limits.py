"""A FastAPI service that holds itself to limits: the import, and the two lines of ``add_middleware``.

uvicorn --app-dir examples fastapi_limits:app --port 8000
"""

import asyncio
from typing import Any

from fastapi import FastAPI

from loadstone.asgi import AdmissionMiddleware

app = FastAPI()
# Or limits="limits.toml", as loadstone find wrote it.
app.add_middleware(AdmissionMiddleware, max_concurrency=3, max_queue=10, requests_per_minute=10, stats_path="/stats")


@app.post("/v1/chat/completions")
async def chat(ask: dict[str, Any]) -> dict[str, Any]:
    """Stands for a model: ten milliseconds a token."""
    tokens = ask["max_tokens"]
    await asyncio.sleep(0.01 * tokens)
    message = {"role": "assistant", "content": "word " * tokens}
    usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": 1 + tokens}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message}], "usage": usage}


@app.get("/health")
async def health() -> dict[str, str]:
    """Answers while every slot is taken: GET passes freely."""
    return {"status": "ok"}
