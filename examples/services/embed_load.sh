#!/bin/bash
# The embedding guide's own lines. Added is -l: a reply tells its own times, and without it ab counts every reply that is
# not as long as the first one as failed.
set -euo pipefail
cd "$(dirname "$0")"
URL=${URL:-http://localhost:8080}

curl -s "$URL/embed_text" -H 'Content-Type: application/json' -d @test_request.json; echo
curl -s "$URL/v1/embeddings" -H 'Content-Type: application/json' -d @embeddings_request.json; echo
ab -l -n "${REQUESTS:-1000}" -c 50 -p test_request.json -T application/json "$URL/embed_text"
wrk -t4 -c100 -d"${SECONDS_OF_LOAD:-30}s" --script=test.lua "$URL/embed_text"
