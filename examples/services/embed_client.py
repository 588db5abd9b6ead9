"""How alike are texts? python embed_client.py TEXT TEXT …: the cosine of each with the first."""

import json
import os
import sys
import urllib.request

texts = sys.argv[1:]
request = urllib.request.Request(
    os.environ.get("LOADSTONE_URL", "http://localhost:8080") + "/embed_text",
    json.dumps({"texts": texts}).encode(),
    {"Content-Type": "application/json"},
)
with urllib.request.urlopen(request) as reply:
    first, *others = json.load(reply)["embeddings"]
for text, vector in zip(texts[1:], others, strict=True):
    print(f"{sum(a * b for a, b in zip(first, vector, strict=True)):.4f}  {text}")
