"""Chat through the service, as it comes: python chat_client.py "你好" (URL of the service: LOADSTONE_URL).

A refusal says when to come back; the openai SDK waits for as long as Retry-After says, and tries again.
"""

import os
import sys

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("LOADSTONE_URL", "http://localhost:8000") + "/v1", api_key="none", max_retries=3
)
model = client.models.list().data[0].id
stream = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": sys.argv[1]}], max_tokens=64, stream=True
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
