#!/bin/bash
# What replaces concurrency_test.sh: the same ladder and rules, in one command.
#
# Why it is better: it closes in on the line between the last level that passed and the first that failed, where the
# script can only halve the failing one; judges each level over its steady state, warm-up and drain left out, and with
# intervals; stops a failing level as soon as its failure is certain; knows two stop rules more (throughput gain below
# 20 %, resources exhausted); calls a level INVALID where this machine was the bottleneck; measures the recommended
# level itself; can be interrupted and resumed; and leaves a report and a limits.toml.

loadstone find \
    --endpoint completions \
    --model "${MODEL_PATH:-/path/to/your/model}" \
    --levels "${LEVELS:-1,2,5,10,20,50,100,200,500,1000}" \
    --random-input-len "${INPUT_LEN:-512}" \
    --random-output-len "${OUTPUT_LEN:-128}" \
    --min-success 0.95 \
    --max-ttft-ms 1000
