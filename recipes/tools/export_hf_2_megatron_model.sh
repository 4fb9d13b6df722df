#!/usr/bin/env bash
# HuggingFace weights MODEL become a megatron-core checkpoint in OUTPUT, and both are compared. Not needed to
# train: `megatron sft --model` reads HuggingFace weights. One process and the memory of the CPU are enough.
# Other flags go to `swift export`.
set -euo pipefail
MODEL=${MODEL:-Qwen/Qwen3-32B}
exec swift export \
    --model "$MODEL" \
    --to_mcore true \
    --torch_dtype "${TORCH_DTYPE:-bfloat16}" \
    --output_dir "${OUTPUT:-$(basename "$MODEL")-mcore}" \
    --test_convert_precision true \
    "$@"
