#!/bin/bash
# What replaces benchmark.py: all the levels of the embedding guide's table, and the line between them, in one command.
#
# Why it is better: nobody has to guess which --concurrency to try next; without a stream the limit is on the mean
# end-to-end time (--max-e2el-ms); the gain rule says from where on more concurrency only makes requests wait; and the
# level to run at is measured in a run of its own and written into limits.toml.

loadstone find \
    --base-url "${EMBEDDING_URL:-http://localhost:8080}" \
    --endpoint embeddings \
    --levels "${LEVELS:-10,50,100,200,500}" \
    --random-input-len 32 \
    --max-e2el-ms 1000
