#!/bin/bash
# qps_concurrency_test.sh - 固定QPS测试脚本
#
# The fixed-rate method as the concurrency-testing guide has it, line by line, but for:
#   - `loadstone bench` stands in the place of `python benchmark_serving.py`;
#   - the `2>&1 | tee …log` that the guide forgot is added: without it there is no log to grep;
#   - the values in the block below can be set from outside (the guide's are the defaults);
#   - where bc is not installed, awk computes what is piped into it.
# Run it in an empty folder: it greps all of *.log and takes the last by name, which is the wrong one from level 100 on.
#
# One command does the same and more: ./qps_rate.sh

TARGET_QPS="${TARGET_QPS:-20}"  # 目标QPS
MODEL_PATH="${MODEL_PATH:-/path/to/your/model}"
LEVELS="${LEVELS:-10 20 50 100 200}"
NUM_PROMPTS="${NUM_PROMPTS:-1000}"
INPUT_LEN="${INPUT_LEN:-512}"
OUTPUT_LEN="${OUTPUT_LEN:-128}"
command -v bc >/dev/null || bc() { local expression; read -r expression; awk "BEGIN { print ($expression) }"; }

echo "🎯 目标QPS: $TARGET_QPS"

# 测试不同并发度下能否达到目标QPS
for concurrency in $LEVELS; do
    echo "📊 测试并发度: $concurrency"
    
    loadstone bench \
        --backend vllm \
        --model $MODEL_PATH \
        --dataset-name random \
        --num-prompts $NUM_PROMPTS \
        --request-rate $TARGET_QPS \
        --max-concurrency $concurrency \
        --random-input-len $INPUT_LEN \
        --random-output-len $OUTPUT_LEN \
        --result-filename "qps_${TARGET_QPS}_concurrency_${concurrency}.json" \
        2>&1 | tee "qps_${TARGET_QPS}_concurrency_${concurrency}.log"
    
    # 检查实际达到的QPS
    ACTUAL_QPS=$(grep "Request throughput" *.log | tail -1 | awk '{print $4}')
    echo "实际QPS: $ACTUAL_QPS"
    
    # 如果达到目标QPS，记录最小所需并发度
    if (( $(echo "$ACTUAL_QPS >= $TARGET_QPS * 0.95" | bc -l) )); then
        echo "✅ 达到目标QPS！最小并发度: $concurrency"
        break
    fi
done
