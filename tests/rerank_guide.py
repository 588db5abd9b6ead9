"""The rerank guide's environment block and its three recommended configurations, as it has them."""

ENVIRONMENT = {
    "WORKERS": "2",
    "MAX_NUM_SEQS": "1024",
    "MAX_NUM_BATCHED_TOKENS": "32768",
    "GPU_MEMORY_UTILIZATION": "0.9",
    "MAX_WORKERS": "8",
    "TENSOR_PARALLEL_SIZE": "1",
}
PRODUCTION = (
    "--workers 2 --max-num-seqs 1024 --max-num-batched-tokens 32768 --gpu-memory-utilization 0.9 "
    "--max-workers 8 --model-size 4B"
)
SCARCE = (
    "--workers 1 --max-num-seqs 256 --max-num-batched-tokens 8192 --gpu-memory-utilization 0.6 "
    "--max-workers 2 --model-size 0.6B"
)
FAST = (
    "--workers 4 --tensor-parallel-size 2 --max-num-seqs 2048 --max-num-batched-tokens 65536 "
    "--gpu-memory-utilization 0.95 --max-workers 16 --model-size 8B"
)
