"""Sort documents by what they say about a query: python rerank_client.py QUERY DOCUMENT DOCUMENT …"""

import json
import os
import sys
import urllib.request

query, *documents = sys.argv[1:]
request = urllib.request.Request(
    os.environ.get("LOADSTONE_URL", "http://localhost:8000") + "/rerank",
    json.dumps({"query": query, "documents": documents}).encode(),
    {"Content-Type": "application/json"},
)
with urllib.request.urlopen(request) as reply:
    for result in json.load(reply)["results"]:
        print(f"{result['relevance_score']:.4f}  {documents[result['index']]}")
