#!/bin/bash
# The chat guide's own lines. Under its limits (10 requests a minute for a client) ab gets 10 answers and 90 × 429;
# start the service with --requests-per-minute 0 --requests-per-hour 0 to see what the engine does.
set -euo pipefail
cd "$(dirname "$0")"
URL=${URL:-http://localhost:8000}

curl -s "$URL/v1/chat/completions" -H 'Content-Type: application/json' -d @request.json; echo
curl -s "$URL/stats"; echo
curl -s "$URL/health"; echo
ab -n "${REQUESTS:-100}" -c 5 -p request.json -T application/json "$URL/v1/chat/completions"
wrk -t4 -c10 -d"${SECONDS_OF_LOAD:-30}s" --latency "$URL/health"
