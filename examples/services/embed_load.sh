#!/bin/bash
# The embedding guide's own lines.
set -euo pipefail
cd "$(dirname "$0")"
URL=${URL:-http://localhost:8080}

curl -s "$URL/embed_text" -H 'Content-Type: application/json' -d @test_request.json; echo
curl -s "$URL/v1/embeddings" -H 'Content-Type: application/json' -d @embeddings_request.json; echo
ab -n "${REQUESTS:-1000}" -c 50 -p test_request.json -T application/json "$URL/embed_text"
wrk -t4 -c100 -d"${SECONDS_OF_LOAD:-30}s" --script=test.lua "$URL/embed_text"
