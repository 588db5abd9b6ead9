#!/bin/bash
# The chat guide's own lines. Under its limits (10 requests a minute for a client) 10 requests are answered, the first
# of them curl's, and 91 get 429; start the service with --requests-per-minute 0 --requests-per-hour 0 to see what the
# engine does. Added is -l: without it ab counts every reply that is not as long as the first one as failed.
set -euo pipefail
cd "$(dirname "$0")"
URL=${URL:-http://localhost:8000}

curl -s "$URL/v1/chat/completions" -H 'Content-Type: application/json' -d @request.json; echo
curl -s "$URL/stats"; echo
curl -s "$URL/health"; echo
ab -l -n "${REQUESTS:-100}" -c 5 -p request.json -T application/json "$URL/v1/chat/completions"
wrk -t4 -c10 -d"${SECONDS_OF_LOAD:-30}s" --latency "$URL/health"
