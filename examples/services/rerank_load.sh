#!/bin/bash
# The rerank guide's health check, a request to each endpoint, and load. -l: a reply tells its own times, so that replies
# differ in length.
set -euo pipefail
cd "$(dirname "$0")"
URL=${URL:-http://localhost:8000}

curl -s "$URL/health"; echo
curl -s "$URL/rerank" -H 'Content-Type: application/json' -d @rerank_request.json; echo
curl -s "$URL/score" -H 'Content-Type: application/json' -d @score_request.json; echo
ab -l -n "${REQUESTS:-100}" -c 10 -p rerank_request.json -T application/json "$URL/v1/rerank"
