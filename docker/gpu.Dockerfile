# The model services on NVIDIA GPUs, chat and rerank on vLLM:
#   docker build -f docker/gpu.Dockerfile --build-arg SERVICE=rerank -t vllm-rerank .
#   docker run -d -p 8000:8000 --gpus all -e WORKERS=2 -e MAX_NUM_SEQS=1024 -e GPU_MEMORY_UTILIZATION=0.9 vllm-rerank
FROM vllm/vllm-openai:v0.32.0

ARG SERVICE=chat
ENV SERVICE=$SERVICE \
    LOADSTONE_HOST=0.0.0.0 \
    LOADSTONE_VLLM_PYTHON=/usr/bin/python3 \
    HF_HOME=/models \
    PATH=/app/env/bin:$PATH \
    PYTHONUNBUFFERED=1

WORKDIR /app
COPY requirements.lock requirements-models.lock ./
# An environment of its own over vLLM's: its torch with CUDA is used, its other versions stay as it needs them.
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN python3 -m venv --system-site-packages /app/env \
 && grep -v '^torch==' requirements-models.lock > models.lock \
 && python -m pip install --no-cache-dir --no-deps -r requirements.lock -r models.lock
COPY pyproject.toml setup.py README.md LICENSE ./
COPY src src
RUN python -m pip install --no-cache-dir --no-deps . \
 && useradd --create-home --uid 1000 loadstone \
 && mkdir /models && chown 1000 /models

USER 1000
VOLUME /models
EXPOSE 8000 8080
ENTRYPOINT ["/bin/sh", "-c", "exec loadstone serve \"$SERVICE\" \"$@\"", "serve"]
