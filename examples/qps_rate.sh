#!/bin/bash
# What replaces qps_concurrency_test.sh: the same levels and target, in one command.
#
# Why it is better: it narrows down to the smallest concurrency that sustains the rate, where the script can only name
# the first of five levels that does; judges over the steady window, where the script divides by the drain as well and
# so fails good servers; confirms the answer with arrivals at the target rate; puts the guide's
# min(max concurrency, rate × mean response time) beside it; and says so, with an exit status of its own, where the
# target is never reached.

loadstone rate \
    --endpoint completions \
    --model "${MODEL_PATH:-/path/to/your/model}" \
    --target-qps "${TARGET_QPS:-20}" \
    --num-prompts "${NUM_PROMPTS:-1000}" \
    --levels "${LEVELS:-10,20,50,100,200}" \
    --random-input-len "${INPUT_LEN:-512}" \
    --random-output-len "${OUTPUT_LEN:-128}"
