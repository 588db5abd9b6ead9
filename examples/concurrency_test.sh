#!/bin/bash
# concurrency_test.sh - 渐进式并发测试脚本
#
# The progressive method as the concurrency-testing guide has it, line by line, but for:
#   - `loadstone bench` stands in the place of `python benchmark_serving.py`;
#   - the values in the block below can be set from outside (the guide's are the defaults);
#   - where bc is not installed, awk computes what is piped into it.
# The server is the one at http://127.0.0.1:8000; another: LOADSTONE_BASE_URL=http://host:port ./concurrency_test.sh
#
# One command does the same and more: ./concurrency_find.sh

MODEL_PATH="${MODEL_PATH:-/path/to/your/model}"
RESULT_DIR="${RESULT_DIR:-./concurrency_results}"
LEVELS="${LEVELS:-1 2 5 10 20 50 100 200 500 1000}"
INPUT_LEN="${INPUT_LEN:-512}"
OUTPUT_LEN="${OUTPUT_LEN:-128}"
command -v bc >/dev/null || bc() { local expression; read -r expression; awk "BEGIN { print ($expression) }"; }

mkdir -p $RESULT_DIR

echo "🚀 开始渐进式并发测试..."

# 测试不同并发度
for concurrency in $LEVELS; do
    echo "📊 测试并发度: $concurrency"
    
    # 执行测试
    loadstone bench \
        --backend vllm \
        --model $MODEL_PATH \
        --dataset-name random \
        --num-prompts $((concurrency * 10)) \
        --request-rate inf \
        --max-concurrency $concurrency \
        --random-input-len $INPUT_LEN \
        --random-output-len $OUTPUT_LEN \
        --save-result \
        --result-filename "$RESULT_DIR/concurrency_${concurrency}.json" \
        2>&1 | tee "$RESULT_DIR/concurrency_${concurrency}.log"
    
    # 提取关键指标
    SUCCESS_RATE=$(grep "Successful requests:" "$RESULT_DIR/concurrency_${concurrency}.log" | awk '{print $3}')
    TOTAL_REQUESTS=$((concurrency * 10))
    SUCCESS_PERCENTAGE=$((SUCCESS_RATE * 100 / TOTAL_REQUESTS))
    
    THROUGHPUT=$(grep "Request throughput" "$RESULT_DIR/concurrency_${concurrency}.log" | awk '{print $4}')
    MEAN_TTFT=$(grep "Mean TTFT" "$RESULT_DIR/concurrency_${concurrency}.log" | awk '{print $4}')
    
    echo "✅ 并发度 $concurrency: 成功率 ${SUCCESS_PERCENTAGE}%, 吞吐量 ${THROUGHPUT} req/s, TTFT ${MEAN_TTFT}ms"
    
    # 判断是否达到系统极限
    if [ "$SUCCESS_PERCENTAGE" -lt 95 ]; then
        echo "⚠️  成功率低于95%，可能接近系统极限"
        echo "🎯 建议最大并发数: $((concurrency / 2))"
        break
    fi
    
    # 检查延迟是否急剧增加
    if (( $(echo "$MEAN_TTFT > 1000" | bc -l) )); then
        echo "⚠️  TTFT超过1秒，性能显著下降"
        echo "🎯 建议最大并发数: $((concurrency / 2))"
        break
    fi
done

echo "📋 测试完成！结果保存在: $RESULT_DIR"
